"""Tells how far a public bank is from a dataset, by FID-like Fréchet distances.

    python experiments/domain_gap.py --encoder=runs/digits --public=bank \
        --public_path=banks/digits [--data=digits] [--per_class]
    python experiments/domain_gap.py --encoder=pixels --public=bank \
        --public_path=banks/digits --data=digits

Features are taken of public and test images only: of the private training set, and of
validation records, which come from it, there is no way to ask for them.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import json
import pathlib
from typing import Any

import jax
from absl import flags

from dpmix_jax.data import DataConfig, Records
from dpmix_jax.data.public import PublicConfig
from dpmix_jax.errors import UserError, require
from dpmix_jax.run import cli, export
from dpmix_jax.run.config import ExperimentConfig, from_config_dict
from dpmix_jax.synthetic import domain_gap

_ENCODER = flags.DEFINE_string(
    "encoder", None, "Workdir of a finished run, or pixels.", required=True
)
_PUBLIC = flags.DEFINE_string(
    "public", None, "As public.name of a config.", required=True
)
_PUBLIC_PATH = flags.DEFINE_string("public_path", None, "As public.path of a config.")
_DATA = {  # of a config
    "name": flags.DEFINE_string("data", None, "By default that of the encoder's run."),
    "path": flags.DEFINE_string("path", None, "As data.path of a config."),
    "image_size": flags.DEFINE_integer("image_size", None, "As data.image_size."),
}
_PER_CLASS = flags.DEFINE_bool("per_class", False, "Compares each class, too.")
_DRAWS = flags.DEFINE_integer("draws", 10, "Draws of images for a comparison.", 1)
cli.define_dry_run()


def measure(
    run: ExperimentConfig | None, of_test: DataConfig, public: PublicConfig
) -> dict[str, domain_gap.Gap | None]:
    """Returns the gap of all images, and with --per_class those of each class."""
    test, bank = domain_gap.load_images(of_test, public)
    features_fn, params = encoder(run, test) if run else (pixels, ())
    both = [domain_gap.features(features_fn, params, each) for each in (bank, test)]
    gaps = {"all": domain_gap.compare(*both, num_draws=_DRAWS.value)}
    for label, name in enumerate(test.class_names if _PER_CLASS.value else ()):
        of_class = (both[0][bank.labels == label], both[1][test.labels == label])
        gap = domain_gap.compare(*of_class, num_draws=_DRAWS.value, seed=[0, label])
        gaps[f"class {name}"] = gap
    return gaps


def dataset(of_run: DataConfig | None) -> DataConfig:
    """Takes what the flags do not say from the encoder's run."""
    given: dict[str, Any] = {
        key: flag.value for key, flag in _DATA.items() if flag.value is not None
    }
    if "name" in given:
        given.setdefault("path", None)
    elif of_run is None:
        raise UserError("--data is missing: --encoder=pixels has no dataset")
    return dataclasses.replace(of_run or DataConfig(), **given)


def finished(workdir: str) -> ExperimentConfig:
    """Returns the config of a finished run."""
    path = pathlib.Path(workdir)
    try:
        (path / "results.json").stat()
        return from_config_dict(json.loads((path / "config.json").read_text()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"--encoder is {workdir}: it must be pixels or the workdir of a finished"
            f" run ({error})"
        ) from None


def encoder(config: ExperimentConfig, test: Records) -> tuple[domain_gap.Function, Any]:
    """Returns the features of a run's model and its EMA weights; reads no data."""
    path, files = pathlib.Path(_ENCODER.value), export.described(config).files
    model, weights, like = export.restore(path, **files)
    fits = like.image_shape == test.image_shape
    allowed = f"a run on images of {test.image_shape}, not {like.image_shape}"
    require(fits, "--encoder", _ENCODER.value, allowed)
    return domain_gap.penultimate(model.logits), weights


def pixels(params: Any, images: jax.Array) -> jax.Array:
    """Returns normalised images as features."""
    return images.reshape(len(images), -1)


def main() -> None:
    run = None if _ENCODER.value == "pixels" else finished(_ENCODER.value)
    of_test = dataset(run.data if run else None)
    public = PublicConfig(name=_PUBLIC.value, path=_PUBLIC_PATH.value)
    if not cli.would(
        f"compare the features of {_PUBLIC.value} with those of test images of"
        f" {of_test.name}, by {_ENCODER.value}"
    ):
        print(domain_gap.table(measure(run, of_test, public), _ENCODER.value))


if __name__ == "__main__":
    cli.start(main)
