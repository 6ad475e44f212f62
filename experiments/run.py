"""Trains one model as a config says.

    python experiments/run.py --config=configs/digits.py --config.privacy.epsilon=8
    python experiments/run.py --config=configs/wrn16_4_cifar10.py:8 --dry_run
    python experiments/run.py --config=configs/digits.py --dry_run --target=h100

Every value of the config can be set by `--config.<key>=<value>`; what follows a colon
in `--config=configs/digits.py:8` is the epsilon whose row of the config is taken.
Started again with the same command, a run that was stopped goes on where it was.
With --distributed several processes, on one host or many, are one run.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import pathlib

from absl import flags

from dpmix_jax.errors import UserError
from dpmix_jax.run import cli, config, dry_run, experiment, hosts, targets
from dpmix_jax.run.workdir import Workdir

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where to write; by default runs/<config file>[-<its argument>]."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Joins the other processes of this run: see docs/scaling.md."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Tells noise, work, memory and hours, without training."
)
_TARGET = flags.DEFINE_enum(
    "target",
    None,
    list(targets.TARGETS),
    "With --dry_run: a device that is not here, to compile for; nothing is timed.",
)


def main() -> int:
    if not _DISTRIBUTED.value:
        return run()
    hosts.initialize()
    with hosts.together():
        return run()


def run() -> int:
    named = cli.config_file()
    experiment_config = config.from_config_dict(_CONFIG.value)
    if _DRY_RUN.value:
        if _DISTRIBUTED.value:
            raise UserError("--dry_run is for one process, without --distributed")
        print(dry_run.dry_run(experiment_config, _TARGET.value))
        return 0
    if _TARGET.value:
        raise UserError("--target is for --dry_run alone")
    folder = pathlib.Path(_WORKDIR.value or cli.default_workdir(*named))
    return experiment.run(experiment_config, Workdir(folder))


if __name__ == "__main__":
    cli.start(main, check=config.check_flags)
