"""Runs as jobs of submitit: side by side on this machine, or in the queue of Slurm.

A job goes on with its run where that stopped. Shortly before its time is over, or it is
preempted, submitit's signal comes: the run saves, and the job goes back to the queue.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import signal
import time
from collections.abc import Collection, Mapping, Sequence

from dpmix_jax.errors import UserError, needing, require
from dpmix_jax.files import locked, write_atomically
from dpmix_jax.progress import say
from dpmix_jax.run import experiment, performance
from dpmix_jax.run.config import ExperimentConfig
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sweeps.grid import Run
from dpmix_jax.sweeps.launch import Ended, Signals
from dpmix_jax.sweeps.worker import attempt, last_line, log_of

with needing("slurm", "--launcher needs"):
    import submitit
    from submitit.core.utils import UncompletedJobError
    from submitit.helpers import Checkpointable

_VISIBLE = "CUDA_VISIBLE_DEVICES"
EVER = 10**6  # minutes, and how often a job may go back to the queue
# Settings that one launcher alone has.
OF = {
    "devices": "local",
    **dict.fromkeys(("minutes", "partition", "gpus", "sbatch"), "slurm"),
}
FORMS = (
    ("devices", r"\d+", "a number"),
    ("sbatch", "[^=]+=.+", "<option>=<value>"),
)


class Task(Checkpointable):
    """What a job does: a run, and the rest of it if the job was stopped.

    Args:
      folder: of the sweep.
      slot: of this machine, which one job holds at a time; None for a job of Slurm.
      sees_all: whether it sees the GPUs that this process sees, and not submitit's.
    """

    def __init__(
        self, folder: pathlib.Path, slot: int | None, *, sees_all: bool = False
    ):
        self._folder, self._slot, self._sees_all = folder, slot, sees_all
        self._visible = os.environ.get(_VISIBLE)

    def __call__(self, config: ExperimentConfig, workdir: Workdir) -> str | None:
        """Returns why the run failed, or None if it did not."""
        if self._sees_all:  # submitit has hidden them
            os.environ.pop(_VISIBLE, None)
            if self._visible is not None:
                os.environ[_VISIBLE] = self._visible
        logging.getLogger("submitit").setLevel(logging.WARNING)  # a log ends as its run
        performance.keep_compiled_code((self._folder / ".jax_cache").resolve())
        if self._slot is None:
            return attempt(self._run, config, workdir)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it
        slot = self._folder / ".jobs" / f"slot-{self._slot}"
        with locked(slot, f"slot {self._slot}", wait=True):  # by a killed sweep's run
            return attempt(self._run, config, workdir)

    def _run(self, config: ExperimentConfig, workdir: Workdir) -> int:
        preempted = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")
        # Slurm sends SIGTERM too, but the job must not end before submitit's signal.
        stopping = [preempted] if self._slot is None else [preempted, signal.SIGTERM]
        with locked(workdir.path, f"workdir {workdir.path}", wait=True):
            pass
        status = experiment.run(config, workdir, stopping)
        if status == 128 + preempted:
            signal.raise_signal(preempted)  # submitit's again, which ends the job
        return status


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jobs:
    """How runs become jobs.

    Attributes:
      launcher: "local" or "slurm".
      parallel: most jobs at once; None is one on each device, or what Slurm allows.
      devices: numbers of GPUs of this machine, of which a job has one; or none.
      minutes: that a job of Slurm may take at a time, by default 240.
      partition: of Slurm.
      gpus: of a job of Slurm.
      sbatch: more options of `sbatch`, such as `account=us`.

    Raises:
      UserError: for a value that is not allowed, or not with this launcher.
    """

    launcher: str
    parallel: int | None = None
    devices: Sequence[str] = ()
    minutes: int | None = None
    partition: str | None = None
    gpus: int | None = None
    sbatch: Sequence[str] = ()

    def __post_init__(self):
        for name, launcher in OF.items():
            if getattr(self, name) and launcher != self.launcher:
                raise UserError(f"--{name} is for --launcher={launcher} alone")
        for name, pattern, form in FORMS:
            for value in getattr(self, name):
                if not re.fullmatch(pattern, value):
                    raise UserError(f"--{name} has {value!r}: it must be {form}")
        if self.devices:
            most = len(set(self.devices))
            allowed = f"at most {most}, a run for each of --devices"
            require((self.parallel or 0) <= most, "--parallel", self.parallel, allowed)

    def run(self, runs: Sequence[Run], path: pathlib.Path, signals: Signals) -> Ended:
        """Does the runs of a sweep that are left; see `launch.launch`.

        After a signal jobs of this machine save and stop, those of Slurm go on.

        Args:
          runs: those that have not finished.
          path: the folder of the sweep.
          signals: those caught so far.

        Raises:
          UserError: if Slurm is not there, or refuses the jobs.
        """
        path = path.resolve()
        workdirs = {run: Workdir(path / run.folder) for run in runs}
        (path / ".jobs").mkdir(mode=0o700, exist_ok=True)  # configs with their seeds
        local, left, jobs = self.launcher == "local", list(runs), {}
        free = [*map(int, self.devices or range(self.parallel or 1))][: self.parallel]
        if not local:
            jobs, left = self._queue(workdirs, path), []
        began, slots = dict.fromkeys(jobs, time.monotonic()), dict[Run, int]()
        try:
            while (left or jobs) and not signals:
                while left and free:
                    run, slot = left.pop(0), free.pop(0)
                    began[run], slots[run] = time.monotonic(), slot
                    jobs[run] = self._start(run, workdirs[run], path, slot)
                for run in [run for run, job in jobs.items() if job.done()]:
                    free += [slots.pop(run)] if local else []
                    why = _why(jobs.pop(run), workdirs[run])
                    yield run, why, time.monotonic() - began[run]
                if left or jobs:
                    time.sleep(0.2 if local else 5)
        finally:  # after a signal, or an error such as a full disk
            if local:
                _stop(jobs.values())
            elif jobs:
                say(
                    "the jobs go on: the same command waits for them, scancel ends them"
                )

    def _start(
        self, run: Run, workdir: Workdir, path: pathlib.Path, slot: int
    ) -> submitit.Job:
        """Starts a job on this machine."""
        executor = submitit.LocalExecutor(path / ".jobs", max_num_timeout=EVER)
        executor.update_parameters(timeout_min=EVER)
        if self.devices:
            executor.update_parameters(gpus_per_node=1, visible_gpus=[slot])
        _begin_log(workdir)
        # Ctrl-C reaches a run once, handed on by the sweep.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        task = Task(path, slot, sees_all=not self.devices)
        job = executor.submit(task, run.config, workdir)
        signal.signal(signal.SIGINT, handler)
        return job

    def _queue(
        self, workdirs: Mapping[Run, Workdir], path: pathlib.Path
    ) -> dict[Run, submitit.Job]:
        """Returns the job that each run has in Slurm, or gets as one of an array."""
        file = path / ".jobs" / "jobs.json"
        ids = json.loads(file.read_text()) if file.exists() else {}
        known = [run for run in workdirs if str(run.folder) in ids]
        jobs: dict[Run, submitit.Job] = {
            run: submitit.SlurmJob(file.parent, ids[str(run.folder)]) for run in known
        }
        jobs = {run: job for run, job in jobs.items() if not job.done()}
        new = {run: where for run, where in workdirs.items() if run not in jobs}
        for workdir in new.values():
            _begin_log(workdir)
        if new:
            configs, task = [run.config for run in new], Task(path, None)
            try:
                queued = self._slurm(path).map_array(task, configs, [*new.values()])
            except RuntimeError as error:
                raise UserError(f"Slurm: {error}") from None
            jobs |= zip(new, queued, strict=True)
            ids |= {str(run.folder): jobs[run].job_id for run in new}
            write_atomically(file, json.dumps(ids))
        return jobs

    def _slurm(self, path: pathlib.Path) -> submitit.Executor:
        executor = submitit.AutoExecutor(
            path / ".jobs", cluster="slurm", slurm_max_num_timeout=EVER
        )
        minutes = self.minutes or 240
        executor.update_parameters(
            name=path.name,
            timeout_min=minutes,
            gpus_per_node=self.gpus,
            slurm_partition=self.partition,
            slurm_array_parallelism=self.parallel,
            # Before the end an update must fit, and its saving.
            slurm_signal_delay_s=min(300, 12 * minutes),
            slurm_additional_parameters=dict(x.split("=", 1) for x in self.sbatch),
        )
        return executor


def _begin_log(workdir: Workdir) -> None:
    """Lets a log no longer end with the error of an earlier job."""
    workdir.path.parent.mkdir(parents=True, exist_ok=True)
    log_of(workdir).touch(mode=0o600)
    with open(log_of(workdir), "a") as file:
        file.write("\nwaiting for its job to begin\n")


def _why(job: submitit.Job, workdir: Workdir) -> str | None:
    """Returns why the run of a job that has ended failed, or None if it did not."""
    log = log_of(workdir)
    if job.paths.result_pickle.exists():
        with contextlib.suppress(UncompletedJobError):
            why = job.result()
            return why and f"{why} ({log})"
    ended = f"job {job.job_id} ended as {job.state}: {last_line(log)}"
    return f"{ended} ({log}, {job.paths.stderr})"


def _stop(jobs: Collection[submitit.Job]) -> None:
    """Lets jobs of this machine save and stop."""
    for job in jobs:
        if not job.done():  # once: a second signal stops a run before it has saved
            os.kill(int(job.job_id), signal.SIGTERM)  # handed on to the run
    while not all(job.done() for job in jobs):
        time.sleep(0.2)
