"""What `experiments/generate.py` does: plans a bank, and has it made and written."""

import pathlib
from collections.abc import Mapping
from typing import Any

from dpmix_jax.data.rendered import Render
from dpmix_jax.errors import UserError
from dpmix_jax.synthetic.bank import Generator, fill
from dpmix_jax.synthetic.diffusion import Diffusion, DiffusionConfig
from dpmix_jax.synthetic.plan import Plan, make_plan


def generate(
    out: str, generator: str, diffusion: Mapping[str, Any], batch_size: int, **plan: Any
) -> str:
    """Writes a bank, or what it lacks, and says what it has.

    Args:
      out: folder of the bank.
      generator: `diffusion`, or `render` for digits or clothes.
      diffusion: settings of `DiffusionConfig`, for `diffusion` only.
      batch_size: images made at a time.
      **plan: as for `make_plan`.

    Raises:
      UserError: for what `make_plan`, the generator or `fill` refuse.
    """
    planned = make_plan(**plan)
    made_by = _generator(generator, planned, diffusion)
    manifest = fill(pathlib.Path(out), planned, made_by, batch_size=batch_size)
    refused = manifest["refused_by_safety_checker"]
    return f"{out}: {planned.count:,} images of {len(planned.class_names)} classes" + (
        f"; {refused:,} more were refused by the safety checker" if refused else ""
    )


def _generator(name: str, plan: Plan, diffusion: Mapping[str, Any]) -> Generator:
    if name == "diffusion":
        if "model" not in diffusion:
            raise UserError(
                "--model is missing: give the folder of a StableDiffusionPipeline, or"
                " its id on the hub"
            )
        return Diffusion(DiffusionConfig(**diffusion), image_shape=plan.image_shape)
    for flag in diffusion:
        raise UserError(f"--{flag} is given: it is of --generator=diffusion only")
    return Render(class_names=plan.class_names, image_shape=plan.image_shape)
