"""Trains one model as a config says.

    python experiments/run.py --config=configs/digits.py --config.method.name=self_aug
    python experiments/run.py --config=configs/wrn16_4_cifar10.py:8 --dry_run

Every value of the config can be set by `--config.<key>=<value>`; what follows a colon
in `--config=configs/digits.py:8` is the epsilon whose row of the config is taken.
Started again with the same command, a run that was stopped goes on where it was.
"""

import functools
import pathlib
import sys

from absl import app, flags, logging

from dpmix_jax import command_line, config, dry_run, experiment
from dpmix_jax.errors import UserError
from dpmix_jax.workdir import Workdir

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where to write; by default runs/<config file>[-<its argument>]."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Tells noise, work, memory and hours, without touching data."
)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    try:
        named = command_line.config_file()
        experiment_config = config.from_config_dict(_CONFIG.value)
        if _DRY_RUN.value:
            print(dry_run.dry_run(experiment_config))
            return
        folder = pathlib.Path(_WORKDIR.value or command_line.default_workdir(*named))
        status = experiment.run(experiment_config, Workdir(folder))
    except UserError as error:
        command_line.fail(error)
    sys.exit(status)


if __name__ == "__main__":
    check = functools.partial(command_line.parse, check=config.check_flags)
    app.run(main, flags_parser=check)
