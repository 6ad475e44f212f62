"""Writes the tables and plots of a sweep again, from its `runs.csv` alone.

    python experiments/report.py --config=configs/table11.py:digits \\
        --runs=runs/table11-digits/runs.csv --to=table11

leaves `table.md`, `table.tex` (LaTeX, booktabs), `plot.png`, `plot.pdf` and `runs.csv`
in the folder, and of a sweep that chooses settings `choice.json`. Nothing is trained,
and no data are read.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import pathlib

from absl import flags

from dpmix_jax import sweeps
from dpmix_jax.run import cli
from dpmix_jax.run.workdir import Workdir

_CONFIG = cli.define_config()
_RUNS = flags.DEFINE_string("runs", None, "The runs.csv of the sweep.", required=True)
_TO = flags.DEFINE_string("to", None, "Folder to write to.", required=True)
cli.define_dry_run()


def main() -> None:
    cli.config_file()
    config = sweeps.from_config_dict(_CONFIG.value)
    records = sweeps.tables.read(config, pathlib.Path(_RUNS.value))
    if cli.would(f"write tables and plots of {len(records)} runs into {_TO.value}"):
        return
    folder = Workdir(pathlib.Path(_TO.value))
    folder.path.mkdir(parents=True, exist_ok=True)
    print(sweeps.tables.write(config, folder, records), end="")
    sweeps.plots.write(config, folder, records)


if __name__ == "__main__":
    cli.start(main)
