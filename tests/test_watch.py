"""A look at a sweep: what is told of each run, and that nothing is touched."""

import fcntl
import os
import sys
import threading
import time

import pytest

from dpmix_jax import UserError, sweeps
from dpmix_jax.files import locked
from dpmix_jax.run.config import to_dict
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sweeps import worker
from tests.programs import call
from tests.test_progress import Terminal
from tests.test_sweep import config, finish, launch, pretend, write_config


@pytest.fixture
def half_way(tmp_path):
    """A sweep of which a run is done, one under way, one failed, one to come."""
    done, running, failed, _ = runs = config().runs()
    workdir = Workdir(tmp_path / done.folder)
    finish(workdir, done.config)
    workdir.write_json("results.json", {**workdir.results(), "seconds": 8.0})
    workdir = Workdir(tmp_path / running.folder)
    with workdir.locked():
        workdir.write_json("config.json", to_dict(running.config))
        for step, seconds in ((1, 5.0), (2, 9.0)):
            workdir.add_metrics({"step": step, "seconds": seconds})
        worker.log_of(workdir).write_text("update 1/3\nupdate 2/3  ETA 0:00:04\n")
        log = worker.log_of(Workdir(tmp_path / failed.folder))
        log.parent.mkdir(exist_ok=True)
        log.write_text("update 1/3\nerror: it broke\n")
        yield tmp_path, runs


def files(path):
    return {
        file: (os.stat(file).st_mtime_ns, file.is_file() and file.read_bytes())
        for file in path.rglob("*")
    }


def test_a_look_tells_each_state_and_touches_nothing(half_way, capsys):
    path, (_, running, failed, _) = half_way
    before = files(path)
    sweeps.watch(config(), path)
    assert files(path) == before
    log = worker.log_of(Workdir(path / failed.folder))
    # 4 s of the run that goes on and would take 12 s, 10 s of the one to come.
    assert capsys.readouterr().out.splitlines() == [
        "4 runs: 1 done, 1 running, 1 failed, 1 queued; ETA 0:00:14",
        f"failed  {failed.name}: it broke ({log})",
        f"running  {running.name}: update 2/3  ETA 0:00:04",
    ]


def test_on_a_terminal_it_goes_on_until_the_last_run_has_ended(tmp_path, monkeypatch):
    stream, left = Terminal(), config().runs()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "70")

    def sleep(seconds):
        run = left.pop(0)
        if left:
            finish(Workdir(tmp_path / run.folder), run.config)
        else:
            log = worker.log_of(Workdir(tmp_path / run.folder))
            log.write_text("error: it broke")

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", sleep)
        sweeps.watch(config(), tmp_path)
    assert left == []
    _, first, *between, last = stream.getvalue().split("\033[H\033[J")
    assert first == "4 runs: 0 done, 0 running, 0 failed, 4 queued; ETA -:--:--\n"
    assert len(between) == 3
    counts, failed = last.splitlines()
    assert counts == "4 runs: 3 done, 0 running, 1 failed, 0 queued; ETA 0:00:00"
    assert failed.startswith(f"failed  {config().runs()[3].name}: it broke (/")
    assert len(failed) == 70


def test_the_reason_of_a_crash_ends_its_log_once(tmp_path):
    run = config().runs()[0]
    log = worker.log_of(Workdir(tmp_path / run.folder))
    log.parent.mkdir(parents=True)
    log.write_text("update 1/3\nembedding: 40%|####  ")  # a bar has no end
    for _ in range(2):
        assert launch(tmp_path, pretend([], {1: "killed by SIGKILL"}), seeds=1) == 1
    assert log.read_text().splitlines()[-1] == "error: killed by SIGKILL"
    assert log.read_text().count("error: ") == 1


def test_who_looks_does_not_keep_a_run_from_its_folder(tmp_path):
    with locked(tmp_path, "run"):
        pass
    with open(tmp_path / ".lock") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        thread = threading.Timer(0.05, fcntl.flock, (look, fcntl.LOCK_UN))
        thread.start()
        with locked(tmp_path, "run"):
            pass
        thread.join()
        with locked(tmp_path, "run"), pytest.raises(UserError, match="run is in use"):
            locked(tmp_path, "run").__enter__()


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    grid = write_config(tmp_path / "grid.py")
    argv = [f"--config={grid}", f"--workdir={tmp_path}/sweep", "--watch"]
    printed = call("experiments/sweep.py", argv)
    assert (printed.returncode, printed.stdout) == (2, "")
    told = f"error: --workdir is {tmp_path}/sweep: there is no such folder\n"
    assert printed.stderr == told
    selection = ["--set=privacy.selection=geometric"]
    selection += ["--set=privacy.expected_candidates=2", "--set=data.validation_size=9"]
    printed = call("experiments/sweep.py", argv + selection)
    assert printed.stderr.startswith("error: --watch tells nothing of a private sel")
