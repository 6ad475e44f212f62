"""Runs killed at random moments end as those that were not."""

import os
import subprocess
import time

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.runs import metrics, outcome, program

KILLS = int(os.environ.get("DPMIX_JAX_KILLS", "6"))
OFTEN = {"logging__checkpoint_every": 1, "logging__eval_every": 2}


def start(workdir):
    return subprocess.Popen(
        program(workdir, **OFTEN),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tmp_path):
    """Whatever was under way: start, compilation, updates, checkpoints, the release.

    DPMIX_JAX_KILLS sets how often. A run is killed until it has finished in spite of
    it; then another one begins. The moments cover the time that an undisturbed run
    takes.
    """
    undisturbed = tmp_path / "undisturbed"
    for _ in range(2):  # the second time with the compiled code of the first
        for path in undisturbed.glob("*"):
            subprocess.run(["rm", "-r", path], check=True)
        began = time.monotonic()
        with start(undisturbed) as process:
            _, errors = process.communicate()
        assert process.returncode == 0, errors
        whole = time.monotonic() - began
    expected = outcome(undisturbed)
    rng, kills, finished, going_on = np.random.default_rng(0), 0, 0, 0
    while kills < KILLS or not finished:
        workdir = tmp_path / f"{finished}"
        with start(workdir) as process:
            try:
                _, errors = process.communicate(timeout=rng.uniform(0.2, 1.1) * whole)
                killed = False
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed = True
        if killed:
            kills += 1
            assert kills < 3 * KILLS + 30, "killed runs do not get on"
            if (workdir / "metrics.jsonl").exists():
                steps = [line["step"] for line in metrics(workdir)]
                assert steps == sorted(set(steps))
        else:
            assert process.returncode == 0, errors
            going_on += "going on after update" in errors
            assert outcome(workdir) == expected
            assert not (workdir / "secret.json").exists()
            assert not list(workdir.rglob("*.partial"))
            finished += 1
    print(f"{kills} kills, {finished} runs finished, {going_on} from a checkpoint")
