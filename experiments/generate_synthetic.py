"""Writes a bank of public synthetic images, a folder for each class.

    python experiments/generate_synthetic.py --out=banks/digits --data=digits \
        --generator=render
    python experiments/generate_synthetic.py --out=banks/cifar10 --data=cifar10 \
        --generator=diffusion --model=<folder, or id on the hub> [--count=50000]

No private record is read: of a dataset only its classes, its number of records and the
shape of its images are taken, which are constants but for `npz`, `folder` and unknown
`tfds:`. Without --data, give --classes, --count and --image_size. Stopped or killed,
the same command goes on; `manifest.json` says how the images were made.
"""

import pathlib
import sys
from typing import Any

from absl import app, flags

from dpmix_jax import command_line, data
from dpmix_jax.data import sources
from dpmix_jax.errors import UserError
from dpmix_jax.progress import say
from dpmix_jax.synthetic import Generator, Plan, fill
from dpmix_jax.synthetic.diffusion import PROMPT, Diffusion, DiffusionConfig
from dpmix_jax.synthetic.render import Render

_OUT = flags.DEFINE_string("out", None, "Folder of the bank.")
_DATA = flags.DEFINE_string("data", None, "As data.name of a config.")
_PATH = flags.DEFINE_string("path", None, "As data.path of a config.")
_CLASSES = flags.DEFINE_string(
    "classes",
    None,
    "File with the name of a class on each line, or folder with one for each class.",
)
_COUNT = flags.DEFINE_integer(
    "count",
    None,
    "Number of images, by default that of the dataset's training records.",
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", 0, "As data.image_size of a config; 0 is the dataset's own."
)
_GENERATOR = flags.DEFINE_string("generator", None, "diffusion or render.")
_SEED = flags.DEFINE_integer("seed", 0, "Public; of all images.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images made at a time.")
_DIFFUSION = {
    "model": flags.DEFINE_string("model", None, "Folder, or id on the hub."),
    "revision": flags.DEFINE_string("revision", None, "Commit, tag or branch."),
    "prompt": flags.DEFINE_string("prompt", PROMPT, "With {name} for the class."),
    "steps": flags.DEFINE_integer("steps", 50, "Of the sampler."),
    "guidance": flags.DEFINE_float("guidance", 7.5, "Weight of the prompt."),
    "sampler": flags.DEFINE_string(
        "sampler", None, "ddim, dpm, euler or pndm; by default the model's own."
    ),
    "dtype": flags.DEFINE_string("dtype", "auto", "float32 or float16."),
    "safety_checker": flags.DEFINE_bool(
        "safety_checker", True, "Whether the model's own checker refuses images."
    ),
}


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise UserError(f"unknown argument {argv[1]}: settings are --<key>=<value>")
        if _OUT.value is None:
            raise UserError("--out is missing: give the folder of the bank")
        if _BATCH_SIZE.value < 1:
            raise UserError(
                f"--batch_size is {_BATCH_SIZE.value}: it must be at least 1"
            )
        plan, out = _plan(), pathlib.Path(_OUT.value)
        manifest = fill(out, plan, _generator(plan), batch_size=_BATCH_SIZE.value)
    except UserError as error:
        command_line.fail(error)
    except KeyboardInterrupt:
        say("stopped: the same command goes on")
        sys.exit(130)
    refused = manifest["refused_by_safety_checker"]
    print(
        f"{out}: {plan.count:,} images of {len(plan.class_names)} classes"
        + (f"; {refused:,} more were refused by the safety checker" if refused else "")
    )


def _plan() -> Plan:
    """Takes what the flags do not say from what is publicly known of the dataset."""
    names = _listed(pathlib.Path(_CLASSES.value)) if _CLASSES.value else ()
    size, count = _IMAGE_SIZE.value, _COUNT.value
    if _DATA.value is None:
        if _PATH.value is not None:
            raise UserError(f"--path is {_PATH.value}: it needs --data")
        given = (("classes", names), ("count", count), ("image_size", size))
        for flag, value in given:
            if not value:
                raise UserError(
                    f"--{flag} is missing: give it, or --data=<name of a dataset>"
                )
        shape = (size, size, 3)
    else:
        own = data.blank(
            data.DataConfig(name=_DATA.value, path=_PATH.value, image_size=size)
        )
        names = _checked(names, own) if names else _known(_DATA.value, own)
        count = len(own) if count is None else count
        shape = own.images.shape[1:]
    if shape[0] != shape[1] or shape[2] not in (1, 3):
        raise UserError(
            f"--image_size is {size}: images of {shape} are not square and RGB or grey,"
            " give a size"
        )
    if not 1 <= shape[0] <= 2048:
        raise UserError(f"--image_size is {size}: it must be in [1, 2048]")
    assert count is not None  # its absence has been refused
    return Plan(class_names=names, count=count, seed=_SEED.value, image_shape=shape)


def _known(name: str, own: data.Records) -> tuple[str, ...]:
    constant = sources.class_names(name)
    if not constant and sources.blank(name, 1) is not None:  # the names are numbers
        raise UserError(
            f"--classes is missing: the class names of {name} are not known without"
            " its files; give a file with one on each line, or a folder of folders"
        )
    return constant or own.class_names


def _checked(names: tuple[str, ...], own: data.Records) -> tuple[str, ...]:
    if len(names) != own.num_classes:
        raise UserError(
            f"--classes is {_CLASSES.value}: it names {len(names)} classes,"
            f" {_DATA.value} has {own.num_classes}"
        )
    return names


def _listed(path: pathlib.Path) -> tuple[str, ...]:
    try:
        if path.is_dir():
            folders = (f.name for f in path.iterdir() if f.is_dir())
            names = sorted(name for name in folders if not name.startswith("."))
        else:
            lines = path.read_text().splitlines()
            names = [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes is {path}: cannot be read ({error})") from None
    if not names:
        raise UserError(f"--classes is {path}: it names no classes")
    return tuple(names)


def _generator(plan: Plan) -> Generator:
    options: dict[str, Any] = {name: flag.value for name, flag in _DIFFUSION.items()}
    if _GENERATOR.value == "diffusion":
        if not options["model"]:
            raise UserError(
                "--model is missing: give the folder of a StableDiffusionPipeline, or"
                " its id on the hub"
            )
        return Diffusion(DiffusionConfig(**options), image_shape=plan.image_shape)
    if _GENERATOR.value != "render":
        raise UserError(
            f"--generator is {_GENERATOR.value}: it must be diffusion or render"
        )
    for name in options:
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} is given: it is of --generator=diffusion only")
    return Render(class_names=plan.class_names, image_shape=plan.image_shape)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
