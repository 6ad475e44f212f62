"""Writes the metrics of a run as CSV, for TensorBoard, or to Weights & Biases.

    python experiments/metrics.py --run=runs/digits --csv=digits.csv
    python experiments/metrics.py --run=runs/digits --tensorboard=logs
    python experiments/metrics.py --run=runs/digits --wandb=my-project

The last two need `pip install "dpmix_jax[tensorboard]"` and `"dpmix_jax[wandb]"`. The
program may be called while the run goes on. What is named nonprivate/... is no part of
what the run's epsilon covers: a service that gets it is told of private records.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import pathlib

from absl import flags

from dpmix_jax.errors import UserError, needing
from dpmix_jax.files import write_atomically
from dpmix_jax.run import cli
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sweeps.tables import to_csv

_RUN = flags.DEFINE_string("run", None, "Workdir of the run.", required=True)
_CSV = flags.DEFINE_string("csv", None, "CSV file to write.")
_TENSORBOARD = flags.DEFINE_string("tensorboard", None, "Folder for TensorBoard.")
_WANDB = flags.DEFINE_string("wandb", None, "Project of Weights & Biases.")
cli.define_dry_run()


def main() -> None:
    path = pathlib.Path(_RUN.value)
    lines = Workdir(path).metrics() if path.is_dir() else []
    if not lines:
        raise UserError(f"--run is {path}: it must be a workdir with metrics.jsonl")
    targets = [f"--{x.name}={x.value}" for x in (_CSV, _TENSORBOARD, _WANDB) if x.value]
    if not targets:
        raise UserError("give one of --csv, --tensorboard and --wandb")
    if cli.would(f"write {len(lines)} lines of {path} to {', '.join(targets)}"):
        return
    if _CSV.value:
        write_atomically(pathlib.Path(_CSV.value), to_csv(lines), mode=0o600)
    if _TENSORBOARD.value:
        with needing("tensorboard", "--tensorboard needs"):
            import tensorboardX
        with tensorboardX.SummaryWriter(_TENSORBOARD.value) as writer:
            for line in lines:
                for name, value in line.items():
                    writer.add_scalar(name, value, line["step"])
    if _WANDB.value:
        with needing("wandb", "--wandb needs"):
            import wandb
        with wandb.init(project=_WANDB.value, name=path.name) as run:
            for line in lines:
                run.log(line, step=line["step"])
    print(f"{len(lines)} lines of metrics")


if __name__ == "__main__":
    cli.start(main)
