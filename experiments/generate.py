"""Writes a bank of public synthetic images, a folder for each class.

    python experiments/generate.py --out=banks/digits --data=digits --generator=render
    python experiments/generate.py --out=banks/cifar10 --data=cifar10 \
        --generator=diffusion --model=<folder, or id on the hub> [--count=50000]

No private record is read: of a dataset only its classes, its number of records and the
shape of its images are taken, which are constants but for `npz`, `folder` and unknown
`tfds:`. Without --data, give --classes, --count and --image_size. Stopped or killed,
the same command goes on; `manifest.json` says how the images were made.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import pathlib
from typing import Any

from absl import flags

from dpmix_jax.data.rendered import Render
from dpmix_jax.errors import UserError
from dpmix_jax.run import cli
from dpmix_jax.synthetic import Generator, Plan, fill
from dpmix_jax.synthetic.diffusion import DTYPES, SAMPLERS, Diffusion, DiffusionConfig
from dpmix_jax.synthetic.plan import make_plan

_OUT = flags.DEFINE_string("out", None, "Folder of the bank.", required=True)
_GENERATOR = flags.DEFINE_enum(
    "generator", None, ["diffusion", "render"], "What makes images.", required=True
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images made at a time.", 1)
_PLAN = [
    flags.DEFINE_string("data", None, "As data.name of a config."),
    flags.DEFINE_string("path", None, "As data.path of a config."),
    flags.DEFINE_string("classes", None, "File with the name of a class on each line."),
    flags.DEFINE_integer(
        "count", None, "Images, by default as many as there are training records."
    ),
    flags.DEFINE_integer(
        "image_size", 0, "As data.image_size of a config; 0 is the dataset's own."
    ),
    flags.DEFINE_integer("seed", 0, "Public; of all images."),
]
_DIFFUSION = [
    flags.DEFINE_string("model", None, "Folder, or id on the hub."),
    flags.DEFINE_string("revision", None, "Commit, tag or branch."),
    flags.DEFINE_string("prompt", DiffusionConfig.prompt, "With {name} for the class."),
    flags.DEFINE_integer("steps", DiffusionConfig.steps, "Of the sampler."),
    flags.DEFINE_float("guidance", DiffusionConfig.guidance, "Weight of the prompt."),
    flags.DEFINE_enum("sampler", None, SAMPLERS, "By default the model's own."),
    flags.DEFINE_enum("dtype", "auto", DTYPES, "Auto is float16 on a GPU."),
    flags.DEFINE_bool(
        "safety_checker", True, "Whether the model's own checker refuses images."
    ),
]
cli.define_dry_run()


def main() -> None:
    given: dict[str, Any] = {flag.name: flag.value for flag in _PLAN}
    of_diffusion = diffusion_flags()
    of, count = given["data"] or given["classes"], given["count"]
    if of is None:
        make_plan(**given)  # says what is missing
    images = f"{count:,} images" if count else "an image for each training record"
    if cli.would(
        f"write into {_OUT.value} what it lacks of {images}, of the classes of {of}, by"
        f" {_GENERATOR.value}"
    ):
        return
    plan = make_plan(**given)
    manifest = fill(
        pathlib.Path(_OUT.value),
        plan,
        generator(plan, of_diffusion),
        batch_size=_BATCH_SIZE.value,
    )
    refused = manifest["refused_by_safety_checker"]
    print(
        f"{_OUT.value}: {plan.count:,} images of {len(plan.class_names)} classes"
        + (f"; {refused:,} more were refused by the safety checker" if refused else "")
    )


def diffusion_flags() -> dict[str, Any]:
    """Returns those that are given.

    Raises:
      UserError: for one with another generator, or a diffusion without a model.
    """
    given = {flag.name: flag.value for flag in _DIFFUSION if flag.present}
    if _GENERATOR.value == "diffusion" and "model" not in given:
        raise UserError(
            "--model is missing: give the folder of a StableDiffusionPipeline, or its"
            " id on the hub"
        )
    for flag in given if _GENERATOR.value != "diffusion" else ():
        raise UserError(f"--{flag} is given: it is of --generator=diffusion only")
    return given


def generator(plan: Plan, of_diffusion: dict[str, Any]) -> Generator:
    """Returns what makes the images, as the flags say."""
    if _GENERATOR.value == "diffusion":
        return Diffusion(DiffusionConfig(**of_diffusion), image_shape=plan.image_shape)
    return Render(class_names=plan.class_names, image_shape=plan.image_shape)


if __name__ == "__main__":
    cli.start(main)
