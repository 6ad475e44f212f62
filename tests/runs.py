"""Small runs on digits, in this process or in one of their own, and what comes out."""

import contextlib
import io
import json
import pathlib
import subprocess
import sys
from typing import NamedTuple
from unittest import mock

from dpmix_jax import UserError
from dpmix_jax.run import experiment
from dpmix_jax.run.cli import load_experiment
from dpmix_jax.run.workdir import Workdir
from tests.conftest import ROOT

SMALL = {
    "seed": 3,
    "model.features": "4,8",
    "model.groups": 2,
    "method.k_base": 2,
    "method.k_self": 1,
    "privacy.epsilon": 0.5,  # quickly calibrated
    "privacy.num_updates": 12,
    "privacy.expected_batch_size": 200,
    "performance.microbatch_size": 64,
    "logging.log_every": 2,
    "logging.eval_every": 4,
    "logging.checkpoint_every": 3,
}


class Done(NamedTuple):
    """What a run left: its exit status, and the lines that it printed."""

    status: int
    out: str
    err: str


def flags(**overrides):
    """Returns the flags of a small run; `__` stands for a dot, None leaves one out."""
    options = {**SMALL, **{k.replace("__", "."): v for k, v in overrides.items()}}
    return [
        f"--config={ROOT}/configs/digits.py",
        *(f"--config.{k}={v}" for k, v in options.items() if v is not None),
    ]


def config(**overrides):
    return load_experiment(flags(**overrides))


def run(workdir, **overrides) -> Done:
    """Runs in this process, as `experiments/run.py` does."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("dpmix_jax.run.performance.keep_compiled_code"),
    ):
        try:
            status = experiment.run(config(**overrides), Workdir(pathlib.Path(workdir)))
        except (UserError, OSError) as error:
            print("error:", error, file=sys.stderr)
            status = 2
    return Done(status, out.getvalue(), err.getvalue())


def program(workdir, **overrides):
    """Returns the command of the same run in a process of its own."""
    script = [sys.executable, "experiments/run.py", f"--workdir={workdir}"]
    return [*script, *flags(**overrides)]


def kill_when(text, workdir, **overrides) -> int:
    """Kills the same run in a process of its own once it has printed a text."""
    process = subprocess.Popen(
        program(workdir, **overrides), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert any(text in line for line in process.stderr)
        process.kill()
    return process.returncode


def metrics(workdir):
    """Lines of `metrics.jsonl` without what differs from run to run."""
    lines = Workdir(pathlib.Path(workdir)).metrics()
    for line in lines:
        del line["seconds"], line["nonprivate/images_per_second"]
    return lines


def outcome(workdir):
    """Everything of a finished run that must not depend on how often it was killed."""
    results = json.loads((workdir / "results.json").read_text())
    del results["seconds"]
    return {
        "weights": (workdir / "model.safetensors").read_bytes(),
        "metrics": metrics(workdir),
        "privacy": (workdir / "privacy.json").read_text(),
        "results": results,
    }
