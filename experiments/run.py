"""Trains one model as a config says.

    python experiments/run.py --config=configs/digits.py --config.method.name=self_aug

Every value of the config can be set by `--config.<key>=<value>`. Started again with the
same command, a run that was stopped goes on where it was.
"""

import pathlib
import sys

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from dpmix_jax import config, experiment
from dpmix_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where to write; by default runs/<name of the config file>."
)


def _keys(values: ml_collections.ConfigDict, prefix: str = "config."):
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; a mistake is one line and exit status 2."""
    try:
        try:
            return flags.FLAGS(argv)
        except AttributeError:  # how config_flags reports a key it does not know
            given = [arg.lstrip("-").split("=")[0] for arg in argv[1:]]
            keys = [key for key in given if key.startswith("config.")]
            config.check_keys(keys, _keys(flags.FLAGS["config"].value))
            raise
    except (UserError, flags.Error) as error:
        fail(error)


def fail(error: Exception):
    """Ends the program by one line for the user."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    try:
        if _CONFIG.value is None:
            raise UserError("--config is missing: give the path of a config file")
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        if not pathlib.Path(path).is_file():
            raise UserError(f"--config is {path}: there is no such file")
        experiment_config = config.from_config_dict(_CONFIG.value)
        workdir = pathlib.Path(_WORKDIR.value or f"runs/{pathlib.Path(path).stem}")
        status = experiment.run(experiment_config, workdir)
    except UserError as error:
        fail(error)
    sys.exit(status)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
