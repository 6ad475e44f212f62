"""Sweeps as jobs of submitit: on this machine, and in a queue of Slurm.

Most jobs here are pretended, and so are the commands of Slurm. Real ones, that are
preempted and killed, are in the slow test at the end.
"""

import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time
import types

import pytest
from submitit.core import submission
from submitit.core.utils import DelayedSubmission
from submitit.local import local

from dpmix_jax import UserError, sweeps
from dpmix_jax.run import experiment
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sweeps import cluster, worker
from tests import test_sweep
from tests.conftest import ROOT
from tests.programs import call
from tests.test_sweep import config, content, finish, pretend, wait_for, write_config


def launch(path, **settings):
    return sweeps.launch(config(), path, run_all=cluster.Jobs(**settings).run)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the same sweep writes without jobs."""
    path = tmp_path_factory.mktemp("whole")
    assert test_sweep.launch(path, pretend([])) == 0
    return content(path)


# Mistakes.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"launcher": "local", "gpus": 1}, "--gpus is for --launcher=slurm alone"),
        ({"launcher": "slurm", "devices": ["0"]}, "--devices is for --launcher=local"),
        (
            {"launcher": "local", "devices": ["a"]},
            "--devices has 'a': it must be a num",
        ),
        (
            {"launcher": "slurm", "sbatch": ["a"]},
            "--sbatch has 'a': it must be <option",
        ),
        (
            {"launcher": "local", "devices": ["0", "0"], "parallel": 2},
            "--parallel is 2: it must be at most 1, a run for each of --devices",
        ),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(UserError, match=message):
        cluster.Jobs(**settings)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--parallel=2"], "--parallel is for --launcher=local or slurm"),
        (
            ["--launcher=local", "--parallel=0"],
            "flag --parallel=0: 0 is not a positive",
        ),
        (
            [
                *("--launcher=local", "--set=privacy.selection=geometric"),
                *(
                    "--set=privacy.expected_candidates=2",
                    "--set=data.validation_size=9",
                ),
            ],
            "--launcher does no private selection: leave it out",
        ),
        (["--launcher=slurm"], 'Slurm: Could not detect "srun"'),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, argv, message):
    monkeypatch.setenv("PATH", "")
    argv += [f"--config={write_config(tmp_path / 'grid.py')}", f"--workdir={tmp_path}"]
    printed = call("experiments/sweep.py", argv)
    assert (printed.returncode, printed.stdout) == (2, "")
    *_, last = printed.stderr.splitlines()
    assert last.startswith(f"error: {message}")


def test_the_extra_is_named_where_submitit_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.delitem(sys.modules, cluster.__name__)
    monkeypatch.delattr(sweeps, "cluster")
    grid = write_config(tmp_path / "grid.py")
    printed = call("experiments/sweep.py", [f"--config={grid}", "--launcher=local"])
    assert printed.stderr.startswith(
        'error: --launcher needs the extra, pip install "dpmix_jax[slurm]" ('
    )
    assert (printed.returncode, printed.stderr.count("\n")) == (2, 1)


# On this machine.


class Job:
    """Has ended when it is looked at for the third time, or at once by SIGTERM."""

    def __init__(self, task, config, workdir):
        self.looks, self.job_id, self.run = 3, "0", (workdir, config)
        self.slot = task._slot

    def done(self):
        self.looks -= 1
        if self.looks == 0:
            finish(*self.run)
        return self.looks <= 0


def test_a_slot_has_one_run_at_a_time_and_the_table_is_the_same(
    tmp_path, monkeypatch, whole
):
    jobs, most = [], []

    def submit(executor, task, config, workdir):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # the job inherits it
        running = [job for job in jobs if job.looks > 0]
        assert task._slot not in [job.slot for job in running]
        assert executor.parameters["visible_gpus"] == [task._slot]
        most.append(len(running) + 1)
        jobs.append(Job(task, config, workdir))
        return jobs[-1]

    monkeypatch.setattr(cluster.submitit.LocalExecutor, "submit", submit)
    monkeypatch.setattr(cluster, "_why", lambda job, workdir: None)
    assert launch(tmp_path, launcher="local", devices=["3", "5", "7"], parallel=2) == 0
    assert {job.slot for job in jobs} == {3, 5}
    assert (len(jobs), max(most)) == (4, 2)
    assert content(tmp_path) == whole
    assert launch(tmp_path, launcher="local") == 0
    assert len(jobs) == 4  # finished runs are not repeated


@pytest.mark.parametrize(("devices", "seen"), [((), ""), (("3",), "3")])
def test_a_job_sees_its_device_alone(tmp_path, monkeypatch, devices, seen):
    def start(**settings):
        assert settings["cuda_devices"] == seen
        raise UserError("as asked")

    monkeypatch.setattr(local, "start_controller", start)
    with pytest.raises(UserError, match="as asked"):
        launch(tmp_path, launcher="local", devices=devices)


def test_a_job_without_a_device_sees_what_the_sweep_sees(tmp_path, monkeypatch):
    """Where submitit hides all GPUs, a job on them would train on the CPU."""
    seen, name = [], "CUDA_VISIBLE_DEVICES"
    monkeypatch.setattr(
        cluster, "attempt", lambda *_: seen.append(os.environ.get(name))
    )
    monkeypatch.setattr(cluster.performance, "keep_compiled_code", lambda folder: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for visible in ("1,2", None):
        with monkeypatch.context() as inherited:
            inherited.delenv(name, raising=False)
            if visible:
                inherited.setenv(name, visible)
            alone, shared = (
                cluster.Task(tmp_path, 0, sees_all=sees_all)
                for sees_all in (False, True)
            )
            for task in (alone, shared):
                inherited.setenv(name, "")  # as submitit does
                task(config(), Workdir(tmp_path))
    assert seen == ["", "1,2", "", None]


def test_what_a_job_of_another_sweep_left_is_no_result(tmp_path, monkeypatch, capsys):
    other = [run.config for run in config("privacy.num_updates=7").runs()]

    def submit(executor, task, own, workdir):
        return Job(task, other[0], workdir)

    monkeypatch.setattr(cluster.submitit.LocalExecutor, "submit", submit)
    monkeypatch.setattr(cluster, "_why", lambda job, workdir: None)
    assert launch(tmp_path, launcher="local") == 1
    assert "is of another experiment" in capsys.readouterr().err


def test_a_signal_reaches_each_job_and_they_are_waited_for(
    tmp_path, monkeypatch, capsys
):
    jobs, told = [], []

    def submit(executor, *args):
        jobs.append(Job(*args))
        jobs[-1].looks, jobs[-1].job_id = 9, str(len(jobs))
        return jobs[-1]

    clock = types.SimpleNamespace(
        sleep=lambda seconds: told or signal.raise_signal(signal.SIGTERM),
        monotonic=time.monotonic,
    )
    monkeypatch.setattr(cluster, "time", clock)
    monkeypatch.setattr(cluster.submitit.LocalExecutor, "submit", submit)
    monkeypatch.setattr(cluster.os, "kill", lambda *args: told.append(args))
    status = launch(tmp_path, launcher="local", parallel=2)
    assert status == 128 + signal.SIGTERM
    assert told == [(1, signal.SIGTERM), (2, signal.SIGTERM)]
    assert all(job.looks <= 0 for job in jobs)
    assert capsys.readouterr().err.endswith("the same command goes on from there\n")


# In a queue.


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands of Slurm that write down how they are called; time does not pass.

    Returns:
      a function that returns the calls, and a list of what happens at each wait.
    """
    folder, events = tmp_path / "bin", []
    folder.mkdir()
    (folder / "sbatch.out").write_text("Submitted batch job 12")
    (folder / "sacct.out").write_text("JobID|State|NodeList\n")
    for name in ("srun", "sbatch", "scontrol", "sacct"):
        program = folder / name
        program.write_text(
            f"#!/bin/sh\necho {name} $* >> {folder}/calls\n"
            f"if [ -f $0.out ]; then cat $0.out; fi\n"
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    clock = types.SimpleNamespace(
        sleep=lambda seconds: events.pop(0)(), monotonic=time.monotonic
    )
    monkeypatch.setattr(cluster, "time", clock)
    cluster.submitit.SlurmJob.watcher.clear()
    yield lambda name: (folder / "calls").read_text().count(name), events, folder
    cluster.submitit.SlurmJob.watcher.clear()


def end(path, job, why=None):
    """Lets a job of the array end as if its run had, or had failed."""
    jobs = path / ".jobs"
    config, workdir = DelayedSubmission.load(jobs / f"{job}_submitted.pkl").args
    if why is None:
        finish(workdir, config)
    result = pickle.dumps(("success", why))
    (jobs / f"{job}_0_result.pkl").write_bytes(result)


def test_runs_are_one_array_and_are_not_submitted_twice(tmp_path, slurm, capsys, whole):
    count, events, folder = slurm
    path = tmp_path / "sweep"
    settings = {"launcher": "slurm", "parallel": 3, "minutes": 60, "gpus": 1}
    settings |= {"partition": "low", "sbatch": ["account=us"]}

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    events += [lambda: end(path, "12_0"), stop]
    assert launch(path, **settings) == 128 + signal.SIGTERM
    assert "scancel" in capsys.readouterr().err
    script = (path / ".jobs" / "12_submission.sh").read_text()
    for option in (
        *("array=0-3%3", "time=60", "partition=low", "gpus-per-node=1"),
        *("account=us", "signal=USR2@300"),
    ):
        assert f"#SBATCH --{option}\n" in script
    assert (path / ".jobs").stat().st_mode & 0o777 == 0o700
    assert count("sbatch") == 1
    # Of the jobs that a stopped sweep has left, one fails, and one is lost.
    log = worker.log_of(Workdir(path / config().runs()[3].folder))
    events += [lambda: end(path, "12_1"), lambda: end(path, "12_2", "it broke")]
    lost = "JobID|State|NodeList\n12_3|NODE_FAIL|\n"
    events += [lambda: (folder / "sacct.out").write_text(lost)]
    events += [cluster.submitit.SlurmJob.watcher.update]
    assert launch(path, **settings) == 1
    assert count("sbatch") == 1
    failed = [
        line for line in capsys.readouterr().err.splitlines() if "failed:" in line
    ]
    assert "it broke (" in failed[0]
    assert "job 12_3 ended as NODE_FAIL: waiting for its job to begin (" in failed[1]
    assert "\nerror: job 12_3 ended as NODE" in log.read_text()
    # These two alone are submitted again.
    (folder / "sbatch.out").write_text("Submitted batch job 34")
    events[:] = [lambda: end(path, "34_0"), lambda: end(path, "34_1")]
    assert launch(path, **settings) == 0
    assert count("sbatch") == 2
    assert "array=0-1%2\n" in (path / ".jobs" / "34_submission.sh").read_text()
    assert content(path) == whole


def test_slurm_that_refuses_is_one_line(tmp_path, slurm):
    program = slurm[2] / "sbatch"
    program.write_text("#!/bin/sh\necho 'sbatch: error: Invalid partition' >&2\nexit 1")
    with pytest.raises(UserError, match="Slurm: sbatch: error: Invalid partition"):
        launch(tmp_path / "sweep", launcher="slurm")


@pytest.fixture
def restored():
    """Puts back what a job takes over of its process."""
    numbers = signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT, signal.SIGINT
    handlers = [signal.getsignal(number) for number in numbers]
    streams = os.dup(1), os.dup(2)
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
        os.close(stream)


@pytest.mark.usefixtures("restored")
def test_a_preempted_job_saves_and_goes_back_to_the_queue(tmp_path, slurm, monkeypatch):
    count, *_ = slurm
    saved = []

    def run(config, workdir, stopping):
        with experiment.caught_signals(stopping) as signals:
            signal.raise_signal(signal.SIGTERM)  # not yet
            assert signals == []
            signal.raise_signal(signal.SIGUSR2)
            saved.append(config)
        return 128 + signals[0]

    monkeypatch.setattr(cluster.experiment, "run", run)
    monkeypatch.setattr(cluster.performance, "keep_compiled_code", lambda folder: None)
    for name, value in {
        **{"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "13", "SUBMITIT_FOLDER": ""},
        **{"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"},
    }.items():
        monkeypatch.setenv(name, value)
    task = DelayedSubmission(
        cluster.Task(tmp_path, None), "config", Workdir(tmp_path / "run")
    )
    task.set_timeout(60, 3)
    task.dump(tmp_path / "12_1_submitted.pkl")
    with pytest.raises(SystemExit):
        submission.process_job(tmp_path)
    assert saved == ["config"]
    assert count("scontrol requeue 12_1") == 1
    assert not list(tmp_path.glob("*_result.pkl"))
    again = DelayedSubmission.load(tmp_path / "12_1_submitted.pkl")
    assert again.args[0] == "config"


# Processes.


def children(pid):
    """Returns the processes below one, parents first."""
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in path.read_text().split()]
    return found + [below for child in found for below in children(child)]


def weights(path):
    return [file.read_bytes() for file in sorted(path.rglob("model.safetensors"))]


@pytest.mark.slow  # seven processes
def test_preempted_and_killed_half_way_it_gives_the_same_table(tmp_path):
    """As users run it, on two devices of this machine.

    One job is preempted, and goes on; then the sweep and its jobs are killed.
    """
    common = {
        **test_sweep.SMALL["common"],
        "privacy": {"num_updates": 100, "expected_batch_size": 32},
        "performance": {"microbatch_size": 64},
        "logging": {"log_every": 100, "eval_every": 100},  # each takes a second
    }
    changes = {"rows": test_sweep.ROWS[:1], "common": common}
    whole, path = tmp_path / "whole", tmp_path / "sweep"
    logs = [path / f"dp-sgd/epsilon=3/seed={seed}.log" for seed in (0, 1)]

    def run_one(config, workdir, signals):
        assert experiment.run(config, workdir) == 0

    assert test_sweep.launch(whole, run_one, **changes) == 0
    program = [
        *(sys.executable, f"{ROOT}/experiments/sweep.py", f"--workdir={path}"),
        f"--config={write_config(tmp_path / 'grid.py', **changes)}",
        *("--launcher=local", "--devices=0,1"),
    ]
    with subprocess.Popen(program, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        for log in logs:
            wait_for(log, "first update")
        tasks = {}
        for pid in children(process.pid):
            folder = pathlib.Path(f"/proc/{pid}")
            if b"submitit.core._submit" in (folder / "cmdline").read_bytes():
                variables = (folder / "environ").read_text().split("\0")
                seen = [v for v in variables if v.startswith("CUDA_VISIBLE_DEVICES=")]
                tasks[seen[0][-1]] = pid
        assert sorted(tasks) == ["0", "1"]
        os.kill(tasks["0"], signal.SIGUSR2)
        wait_for(logs[0], "going on after update")
        for pid in (process.pid, *children(process.pid)):
            os.kill(pid, signal.SIGKILL)
    assert "stopped after update" in logs[0].read_text()
    assert "SIGUSR2" not in logs[1].read_text()
    assert not (path / "dp-sgd/epsilon=3/seed=0/results.json").exists()

    jobs = cluster.Jobs(launcher="local", devices=["0", "1"])
    assert sweeps.launch(config(**changes), path, run_all=jobs.run) == 0
    assert test_sweep.outcome(path) == test_sweep.outcome(whole)
    assert weights(path) == weights(whole) != []
