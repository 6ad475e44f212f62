"""Runs a grid of experiments over paired seeds and prints its table.

    python experiments/sweep.py --config=configs/table11.py:digits --config.seeds=3

`dpmix_jax/sweeps/grid.py` shows what a sweep's config holds. Runs follow one another in
a process beside this one, each with its log beside its workdir: one that fails is
reported, and the rest go on. Started again with the same command, a sweep that was
stopped goes on where it was; finished runs are not repeated. `runs.csv` and `table.md`
in the workdir are rewritten after each run; where the metric is of validation records,
`choice.json` says which settings come out.

    python experiments/sweep.py --config=configs/rates.py:vit_b16:cifar10-1 \
        --set=privacy.selection=geometric --set=privacy.expected_candidates=10

makes a private selection of the same grid: it runs a random number of candidates, keeps
the best by a noisy count of correct validation records in `selected/`, deletes all
others, and the epsilon of the model that is left covers the whole search.

    python experiments/sweep.py --config=configs/table11.py --launcher=local \
        --devices=0,1,2,3
    python experiments/sweep.py --config=configs/table11.py --launcher=slurm \
        --partition=gpu --gpus=1 --minutes=240

makes a job of each run: one on each GPU of this machine, or an array of Slurm, whose
jobs go back to the queue when their time is over. `--watch` shows how far they are.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import pathlib
from typing import Any

from absl import flags

from dpmix_jax import UserError, sweeps
from dpmix_jax.run import cli

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where to write; by default runs/<config file>[-<its argument>]."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "A setting of every run, as in --set=privacy.num_updates=3; repeatable."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Tells what the runs would take, and which files are missing."
)
_WATCH = flags.DEFINE_bool(
    "watch", False, "Shows how far the runs are, from another terminal; reads only."
)
_LAUNCHER = flags.DEFINE_enum(
    "launcher",
    None,
    ["local", "slurm"],
    "Runs as jobs of submitit, on this machine or in the queue of Slurm; by default"
    " one after another.",
)
_OF_JOBS: list[flags.FlagHolder[Any]] = [
    flags.DEFINE_integer("parallel", None, "Most jobs at once.", lower_bound=1),
    flags.DEFINE_list(
        "devices", [], "GPUs of this machine, as 0,1,2,3: a job has one, or none."
    ),
    flags.DEFINE_integer(
        "minutes",
        None,
        "Time limit of a job of Slurm, which then goes back to the queue; 240 if not"
        " given.",
        lower_bound=5,
    ),
    flags.DEFINE_string("partition", None, "Partition of Slurm."),
    flags.DEFINE_integer("gpus", None, "GPUs of a job of Slurm.", lower_bound=1),
    flags.DEFINE_multi_string(
        "sbatch", [], "More options of sbatch, as in --sbatch=account=us; repeatable."
    ),
]


def main() -> int:
    named = cli.config_file()
    config = sweeps.from_config_dict(_CONFIG.value, _SET.value)
    if _DRY_RUN.value:
        print(sweeps.sheet(config), end="")
        return 0
    path = pathlib.Path(_WORKDIR.value or cli.default_workdir(*named))
    if _WATCH.value:
        sweeps.watch(config, path)
        return 0
    if jobs := _jobs():
        return sweeps.launch(config, path, run_all=jobs.run)
    with sweeps.Worker(path / ".jax_cache") as worker:
        return sweeps.launch(config, path, worker.run)


def _jobs():
    """Returns how runs become jobs, or None where there is no --launcher."""
    given = {flag.name: flag.value for flag in _OF_JOBS if flag.value}
    if _LAUNCHER.value is None:
        for name in given:
            raise UserError(f"--{name} is for --launcher=local or slurm")
        return None
    from dpmix_jax.sweeps import cluster  # needs submitit

    return cluster.Jobs(launcher=_LAUNCHER.value, **given)


if __name__ == "__main__":
    cli.start(main)
