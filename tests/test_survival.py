"""Full disks, folders that nobody can write, clocks that jump, lost processes."""

import contextlib
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest

from dpmix_jax import Mechanism
from dpmix_jax.files import write_atomically
from dpmix_jax.models import kept
from dpmix_jax.run import ledger
from dpmix_jax.run.workdir import Workdir
from tests.conftest import ROOT
from tests.runs import outcome, run
from tests.two_processes import T

MECHANISM = Mechanism(sampling_prob=0.1, num_updates=2, noise_multiplier=2.0)


@contextlib.contextmanager
def full_disk(after):
    """No file gets longer than so many bytes: what is written beyond them fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    slowest = "jax_persistent_cache_min_compile_time_secs"
    cached = getattr(jax.config, slowest)
    jax.config.update(slowest, 1e9)  # no half of compiled code, which others would read
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        jax.config.update(slowest, cached)


def test_a_file_on_a_full_disk_stays_as_it_was(tmp_path):
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    with full_disk(3), pytest.raises(OSError, match=f"File too large: '{path}'"):
        write_atomically(path, "newer")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


@pytest.mark.parametrize("more", [0, 40])
def test_a_ledger_on_a_full_disk_keeps_its_lines_and_nothing_else(tmp_path, more):
    """A run that could not be written down does not begin, and can try again."""
    book = ledger.Ledger(tmp_path / "records.jsonl")

    def spend():
        book.spend(MECHANISM, epsilon=1.0, delta=1e-5, workdir="a")

    spend()
    before = book.path.read_bytes()
    with full_disk(len(before) + more), pytest.raises(OSError, match=f"{book.path}"):
        spend()
    assert book.path.read_bytes() == before
    spend()
    assert len(book.runs()) == 2


def test_embeddings_on_a_full_disk_go_on_from_what_is_written(tmp_path):
    def embed(step, batch, inputs):
        del inputs
        return (batch + step).astype(np.float16)[:, None], np.zeros(
            (2, 1, 3), np.float32
        )

    def keep():
        return kept.keep(
            *(tmp_path / "embeddings", jax.jit(embed), np.asarray, None),
            num_records=5,
            num_sets=2,
            microbatch_size=2,
        )

    with full_disk(70), pytest.raises(OSError, match=r"/embeddings\.partial"):
        keep()
    np.testing.assert_array_equal(
        keep()["embeddings"][:, 0], [0, 1, 2, 3, 4, 1, 2, 3, 4, 5]
    )


@pytest.mark.slow
def test_a_run_on_a_full_disk_ends_as_another_once_there_is_room(tmp_path, monkeypatch):
    """It ends in one line at whatever file there is no room for, and loses nothing."""
    assert run(tmp_path / "undisturbed").status == 0
    monkeypatch.setenv("DPMIX_JAX_LEDGER", str(tmp_path / "ledger"))
    workdir, places = tmp_path / "run", set()
    for room in itertools.accumulate([10] + [1.6] * 40, lambda a, b: int(a * b)):
        with full_disk(room):
            done = run(workdir)
        if done.status == 0:
            break
        *_, last = done.err.splitlines()
        assert last.startswith("error: [Errno "), last
        assert f": '{tmp_path}/" in last
        places.add(last.rpartition("/")[2].strip("'"))
    assert {"config.json", "3.safetensors"} < places
    assert outcome(workdir) == outcome(tmp_path / "undisturbed")


def test_a_workdir_that_nobody_can_write_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for path in ("/proc/run", tmp_path / "file" / "run"):
        done = run(path)
        assert done.status == 2
        assert done.err.startswith(f"error: workdir {path} is not writable: ")
        assert done.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Persisting input arguments")  # joblib's clock
def test_a_clock_that_jumps_changes_no_time_that_a_run_tells(tmp_path, monkeypatch):
    """As when a machine that was asleep finds its time server."""
    clock = itertools.cycle([1e9, -1e9, 2e9, 0.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    began = time.monotonic()
    assert run(tmp_path).status == 0
    whole = time.monotonic() - began
    seconds = [line["seconds"] for line in Workdir(tmp_path).metrics()]
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] <= seconds[-1] < whole


def test_the_seconds_of_a_run_are_those_of_all_its_starts(tmp_path):
    """A run that ended before its release tells later how long it took before."""
    with mock.patch("dpmix_jax.run.experiment.release", side_effect=OSError):
        assert run(tmp_path).status == 2
    path, slept = tmp_path / "metrics.jsonl", 1e6
    lines = Workdir(tmp_path).metrics()
    lines[-1]["seconds"] += slept
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(tmp_path).status == 0
    assert slept < Workdir(tmp_path).results()["seconds"] < slept + 600


def start(folder, address, number):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.two_processes", str(folder)),
            *(address, str(number)),
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_on_two(folder, *, lose_after=None):
    """Starts both processes, kills the second after an update; returns how they end."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with start(folder, address, 0) as first, start(folder, address, 1) as second:
        try:
            if lose_after:
                assert any(line == f"{lose_after}\n" for line in first.stdout)
                second.kill()
            for process in (first, second):
                process.communicate(timeout=120)
        finally:
            first.kill()
            second.kill()
    return first.returncode, second.returncode


@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_both_go_on_with_the_same_bits(tmp_path):
    assert train_on_two(tmp_path / "undisturbed") == (0, 0)
    first, second = train_on_two(tmp_path / "disturbed", lose_after=9)
    assert second == -signal.SIGKILL
    assert first != 0  # it neither waits for ever nor goes on with half of a sum
    assert train_on_two(tmp_path / "disturbed") == (0, 0)
    names = [f"{step}.safetensors" for step in (T - 1, T)]
    for name in names:
        whole, gone_on = (
            (tmp_path / folder / name).read_bytes()
            for folder in ("undisturbed", "disturbed")
        )
        assert whole == gone_on
