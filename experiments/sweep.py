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
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import pathlib

from absl import flags

from dpmix_jax import sweeps
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


def main() -> int:
    named = cli.config_file()
    config = sweeps.from_config_dict(_CONFIG.value, _SET.value)
    if _DRY_RUN.value:
        print(sweeps.sheet(config), end="")
        return 0
    path = pathlib.Path(_WORKDIR.value or cli.default_workdir(*named))
    with sweeps.Worker(path / ".jax_cache") as worker:
        return sweeps.launch(config, path, worker.run)


if __name__ == "__main__":
    cli.start(main)
