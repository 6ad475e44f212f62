"""Trains one model as a config says.

    python experiments/run.py --config=configs/digits.py --config.method.name=self_aug

Every value of the config can be set by `--config.<key>=<value>`. Started again with the
same command, a run that was stopped goes on where it was.
"""

import pathlib
import re
import sys
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from dpmix_jax import config, experiment
from dpmix_jax.errors import UserError
from dpmix_jax.workdir import Workdir

# New attributes pass here, so that they are refused together with those of files.
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Path of a config file.",
    lock_config=False,
    accept_new_attributes=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where to write; by default runs/<name of the config file>."
)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; a mistake is one line and exit status 2."""
    try:
        for arg in argv[1:]:
            key = re.match(r"--?config\.([^=]*)", arg)
            if key:
                config.check_path(key[1])
        return flags.FLAGS(argv)
    except (UserError, flags.Error) as error:
        fail(error)
    except Exception as error:  # whatever the user's config file raises
        fail(f"--config cannot be loaded: {type(error).__name__}: {error}")


def fail(error: Exception | str) -> NoReturn:
    """Ends the program by one line for the user."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
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
        folder = pathlib.Path(_WORKDIR.value or f"runs/{pathlib.Path(path).stem}")
        status = experiment.run(experiment_config, Workdir(folder))
    except UserError as error:
        fail(error)
    sys.exit(status)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
