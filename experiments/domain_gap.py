"""Tells how far a public bank is from a dataset, by FID-like Fréchet distances.

    python experiments/domain_gap.py --encoder=runs/digits --public=bank \
        --public_path=banks/digits [--data=digits] [--per_class]
    python experiments/domain_gap.py --encoder=pixels --public=bank \
        --public_path=banks/digits --data=digits

Features are taken of public and test images only: of the private training set, and of
validation records, which come from it, there is no way to ask for them. The encoder is
the EMA weights of a finished run, or the normalised pixels. The weights of a run are
what its guarantee covers, so using them here is post-processing. The distances depend
on the test images, which are not protected, as test accuracy does.
"""

import json
import pathlib
from typing import Any

from absl import app, flags, logging

from dpmix_jax import command_line, domain_gap
from dpmix_jax.data import DataConfig
from dpmix_jax.data.public import PublicConfig
from dpmix_jax.domain_gap import Encoder
from dpmix_jax.errors import UserError
from dpmix_jax.files import write_atomically
from dpmix_jax.workdir import Workdir

_ENCODER = flags.DEFINE_string(
    "encoder", None, "Workdir of a finished run, or pixels, which needs no model."
)
_PUBLIC = flags.DEFINE_string("public", None, "As public.name of a config.")
_PUBLIC_PATH = flags.DEFINE_string("public_path", None, "As public.path of a config.")
_DATA = flags.DEFINE_string(
    "data", None, "As data.name of a config; by default that of the encoder's run."
)
_PATH = flags.DEFINE_string("path", None, "As data.path of a config.")
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size",
    None,
    "As data.image_size of a config; by default that of the encoder's run.",
)
_PER_CLASS = flags.DEFINE_bool("per_class", False, "Compares each class, too.")
_DRAWS = flags.DEFINE_integer("draws", 10, "Draws of images for each comparison.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 512, "Images encoded at a time.")
_JSON = flags.DEFINE_string("json", None, "File to write all distances to.")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise UserError(f"unknown argument {argv[1]}: settings are --<key>=<value>")
        result = _measure()
        print(domain_gap.table(result))
        if _JSON.value is not None:
            _write(pathlib.Path(_JSON.value), result)
    except UserError as error:
        command_line.fail(error)


def _measure() -> dict[str, Any]:
    if _ENCODER.value is None:
        raise UserError("--encoder is missing: give the workdir of a run, or pixels")
    if _PUBLIC.value is None:
        raise UserError(
            "--public is missing: give the name of a public dataset, or bank"
        )
    for flag in (_DRAWS, _BATCH_SIZE):
        if flag.value < 1:
            raise UserError(f"--{flag.name} is {flag.value}: it must be at least 1")
    public = PublicConfig(name=_PUBLIC.value, path=_PUBLIC_PATH.value)
    workdir = (
        None if _ENCODER.value == "pixels" else Workdir(pathlib.Path(_ENCODER.value))
    )
    test, bank = domain_gap.load_images(_data(workdir), public)
    if workdir is None:
        encoder = Encoder("pixels", domain_gap.pixels, ())
    else:
        encoder = domain_gap.load_encoder(workdir, test.images.shape[1:])
    return domain_gap.measure(
        encoder,
        bank,
        test,
        num_draws=_DRAWS.value,
        per_class=_PER_CLASS.value,
        batch_size=_BATCH_SIZE.value,
    )


def _data(workdir: Workdir | None) -> DataConfig:
    """Takes what the flags do not say from the encoder's run."""
    trained_on = None if workdir is None else domain_gap.read_config(workdir).data
    if _DATA.value is None:
        for flag in (_PATH, _IMAGE_SIZE):
            if flag.value is not None:
                raise UserError(f"--{flag.name} is {flag.value}: it needs --data")
        if trained_on is None:
            raise UserError("--data is missing: --encoder=pixels has no dataset")
        return trained_on
    size = _IMAGE_SIZE.value
    if size is None:
        size = 0 if trained_on is None else trained_on.image_size
    return DataConfig(name=_DATA.value, path=_PATH.value, image_size=size)


def _write(path: pathlib.Path, result: dict[str, Any]) -> None:
    try:
        write_atomically(path, json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"--json is {path}: cannot be written ({error.strerror})"
        ) from None


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
