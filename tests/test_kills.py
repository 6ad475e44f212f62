"""What is killed at random moments ends as what was not.

DPMIX_JAX_KILLS sets how many kills there are of each kind.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests import files, runs, test_sweep
from tests.conftest import ROOT
from tests.runs import metrics

KILLS = int(os.environ.get("DPMIX_JAX_KILLS", "1"))
OFTEN = {"logging__checkpoint_every": 1, "logging__eval_every": 2}


class Case(NamedTuple):
    """What is killed.

    Attributes:
      command: of a workdir.
      outcome: of a finished workdir, which must not depend on kills.
    """

    command: Callable[[pathlib.Path], list[str]]
    outcome: Callable[[pathlib.Path], Any]


def a_run(folder) -> Case:
    """Start, compilation, updates, checkpoints, the release."""
    del folder
    return Case(lambda workdir: runs.program(workdir, **OFTEN), runs.outcome)


def a_run_with_caches(folder) -> Case:
    """Images that are decoded into a cache, and embeddings that are kept."""
    photos = files.put(folder / "photos", files.class_members(("cat", "dog"), 500))
    values = {
        "seed": 3,
        "data": {"name": "folder", "path": str(photos), "image_size": 8},
        "model": {"name": "scattering_linear", "scales": 1, "angles": 4},
        "finetune": {"trainable": "head", "embeddings": "kept", "sets": 8},
        "method": {"name": "dp_mix_self", "k_base": 2, "k_self": 1},
        "privacy": {"epsilon": 3.0, "expected_batch_size": 200, "num_updates": 12},
        "optimizer": {"learning_rate": 1.0, "ema_decay": 0.9},
        "performance": {"microbatch_size": "64"},
        "logging": {"log_every": 2, "eval_every": 4, "checkpoint_every": 1},
    }
    config = folder / "caches.py"
    config.write_text(
        "from configs._base import experiment\n\n\ndef get_config():\n"
        f"    return experiment(**{values!r})\n"
    )

    def command(workdir):
        program = "experiments/run.py"
        return [sys.executable, program, f"--config={config}", f"--workdir={workdir}"]

    return Case(command, runs.outcome)


def a_sweep(folder) -> Case:
    """Four runs in one process, their table, and what is between them."""
    config = test_sweep.write_config(folder / "grid.py", rows=test_sweep.ROWS)

    def command(workdir):
        program = f"{ROOT}/experiments/sweep.py"
        return [sys.executable, program, f"--config={config}", f"--workdir={workdir}"]

    return Case(command, test_sweep.outcome)


def start(case, workdir):
    return subprocess.Popen(
        case.command(workdir),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(process):
    """Kills a process, and that in which it does its runs."""
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    found = pathlib.Path(children).read_text().split()
    for pid in (process.pid, *map(int, found)):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def check_metrics(path, undisturbed):
    """What was told is what is told undisturbed, no update twice."""
    told = metrics(path.parent)
    assert told == metrics(undisturbed)[: len(told)]


@pytest.mark.slow
@pytest.mark.parametrize("make", [a_run, a_run_with_caches, a_sweep])
def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path, monkeypatch, make):
    """It is killed until it has finished in spite of it; then another one begins.

    The moments cover the time that it took the last time that nothing disturbed it,
    with the code that the first one has compiled.
    """
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path / "cache"))
    case, undisturbed = make(tmp_path), tmp_path / "undisturbed"
    for _ in range(2):
        shutil.rmtree(undisturbed, ignore_errors=True)
        shutil.rmtree(tmp_path / "cache/data", ignore_errors=True)
        began = time.monotonic()
        with start(case, undisturbed) as process:
            _, errors = process.communicate()
        assert process.returncode == 0, errors
        whole = time.monotonic() - began
    expected = case.outcome(undisturbed)
    rng, kills, finished, going_on = np.random.default_rng(0), 0, 0, 0
    while kills < KILLS or not finished:
        workdir = tmp_path / f"{finished}"
        fresh, began = not workdir.exists(), time.monotonic()
        with start(case, workdir) as process:
            try:
                _, errors = process.communicate(timeout=rng.uniform(0.2, 1.1) * whole)
                killed = False
            except subprocess.TimeoutExpired:
                kill(process)
                killed = True
        if killed:
            kills += 1
            assert kills < 3 * KILLS + 30, "what is killed does not get on"
            for path in workdir.rglob("metrics.jsonl"):
                same = undisturbed / path.relative_to(workdir)
                check_metrics(path, same.parent)
        else:
            assert process.returncode == 0, errors
            going_on += "going on after" in errors or "finished before" in errors
            assert case.outcome(workdir) == expected
            assert not list(workdir.rglob("secret.json"))
            assert not list(workdir.rglob("*.partial"))
            assert not list(workdir.rglob("embeddings*"))
            shutil.rmtree(tmp_path / "cache/data", ignore_errors=True)
            finished += 1
            if fresh:  # the machine is faster than it was, or slower
                whole = time.monotonic() - began
    print(f"{kills} kills, {finished} finished, {going_on} of them went on")
