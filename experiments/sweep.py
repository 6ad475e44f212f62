"""Runs a grid of experiments over paired seeds and prints its table.

    python experiments/sweep.py --config=configs/table11.py:digits --config.seeds=3

`dpmix_jax/sweep.py` shows what a sweep's config holds. Each run is a process of its
own, with its log beside its workdir: one that fails is reported, and the rest go on.
Started again with the same command, a sweep that was stopped goes on where it was;
finished runs are not repeated. `runs.csv` and `table.md` in the workdir are rewritten
after each run.
"""

import contextlib
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

from dpmix_jax import command_line, sweep
from dpmix_jax.errors import UserError
from dpmix_jax.experiment import caught_signals
from dpmix_jax.progress import duration, say
from dpmix_jax.workdir import Workdir

RUN = pathlib.Path(__file__).with_name("run.py")

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where to write; by default runs/<config file>[-<its argument>]."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "A setting of every run, as in --set=privacy.num_updates=3; repeatable."
)


class Sweep:
    """The runs of a sweep in their folder: finished, failed and left to do."""

    def __init__(self, config: sweep.SweepConfig, folder: Workdir):
        self.config, self.folder = config, folder
        self.runs = config.runs()
        # Reads every run's config, so that a mistake is found before anything is run.
        self.expected = [command_line.load_experiment(run.flags) for run in self.runs]
        self.records: dict[int, dict[str, Any]] = {}  # by index of the run
        self.failures: dict[int, str] = {}
        self.seconds: list[float] = []  # of the runs done now

    def run(self, signals: Sequence[int]) -> int:
        """Does what is left; returns the exit status, 128 + n after signal n."""
        for i in range(len(self.runs)):
            self._collect(i)
        say(
            f"{len(self.runs)} runs into {self.folder.path},"
            f" {len(self.records)} of them finished before"
        )
        for i in range(len(self.runs)):
            if i not in self.records and i not in self.failures:
                started = time.time()
                error = self._attempt(i, signals)
                if signals:
                    say("stopped: the same command goes on from there")
                    return 128 + signals[0]
                if error is None:
                    self.seconds.append(time.time() - started)
                    self._collect(i)
                else:
                    self.failures[i] = error
                self._tabulate()
                self._tell(i)
        print(self._tabulate(), end="", flush=True)
        for i, error in self.failures.items():
            say(f"failed: {self._name(i)}: {error}")
        return 1 if self.failures else 0

    def _workdir(self, i: int) -> Workdir:
        return Workdir(self.folder.path / self.runs[i].folder)

    def _name(self, i: int) -> str:
        run = self.runs[i]
        parts = (run.row, self.config.label(run.point), f"seed {run.seed}")
        return ", ".join(filter(None, parts))

    def _collect(self, i: int) -> None:
        """Takes in a run that is finished, or fails it if it was of other settings."""
        workdir = self._workdir(i)
        if workdir.results() is None:
            return
        try:
            workdir.check(self.expected[i])
        except UserError as error:
            self.failures[i] = str(error)
        else:
            self.records[i] = sweep.read_record(self.config, self.runs[i], workdir)

    def _tabulate(self) -> str:
        records = [self.records[i] for i in sorted(self.records)]
        table = sweep.to_markdown(self.config, records)
        self.folder.write("runs.csv", sweep.to_csv(records))
        self.folder.write("table.md", table)
        return table

    def _tell(self, i: int) -> None:
        """Prints how the run that just ended came out, and when all will have."""
        total = len(self.runs)
        left = total - len(self.records) - len(self.failures)
        outcome = f"FAILED: {self.failures.get(i)}"
        if i in self.records:
            config, value = self.config, self.records[i][self.config.metric]
            outcome = f"{config.metric} {config.show(value)}{config.unit}"
            outcome += f", {self.seconds[-1]:.0f} s"
        eta = "-:--:--"
        if self.seconds:
            pace = sum(self.seconds) / len(self.seconds)
            eta = duration(pace * left)
        number = f"{total - left:>{len(str(total))}}/{total}"
        say(f"run {number}  {self._name(i)}: {outcome}; ETA {eta}")

    def _attempt(self, i: int, signals: Sequence[int]) -> str | None:
        """Runs one run in a process of its own; returns why it failed, if it did."""
        workdir = self._workdir(i).path
        wait_until_free(workdir, signals)
        if signals:
            return None
        log = workdir.with_name(f"{workdir.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        cache = str(self.folder.path.resolve() / ".jax_cache")
        with open(log, "a") as file:
            # Its own process group: Ctrl-C reaches it once, from here.
            process = subprocess.Popen(
                [sys.executable, RUN, *self.runs[i].flags, f"--workdir={workdir}"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
                env={"JAX_COMPILATION_CACHE_DIR": cache, **os.environ},
            )
        status = wait(process, log, signals)
        if status == 0:
            return None
        how = f"exit status {status}"
        if status < 0:
            how = f"killed by {signal.Signals(-status).name}"
        return f"{how}: {last_line(log).removeprefix('error: ')} ({log})"


def wait_until_free(workdir: pathlib.Path, signals: Sequence[int]) -> None:
    """Waits for a run that a killed sweep has left running, so as not to lose it."""
    with contextlib.suppress(FileNotFoundError), open(workdir / ".lock") as lock:
        told = False
        while not signals:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not told:
                    say(f"waiting for the process that is still running {workdir}")
                told = True
                time.sleep(0.5)


def wait(process: subprocess.Popen, log: pathlib.Path, signals: Sequence[int]) -> int:
    """Waits for a run, hands it the first signal, and shows its progress."""
    live, handed_on = sys.stderr.isatty(), False
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(timeout=0.2)
            print("\r\033[K" if live else "", end="", file=sys.stderr)
            return status
        if signals and not handed_on:
            process.send_signal(signals[0])
            handed_on = True
        if live:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            print(f"\r\033[K{last_line(log)[: columns - 1]}\r", end="", file=sys.stderr)


def last_line(log: pathlib.Path) -> str:
    """Returns the last line of a log, of which nothing but the end is read."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    try:
        named = command_line.config_file()
        config = sweep.from_config_dict(_CONFIG.value, _SET.value)
        path = pathlib.Path(_WORKDIR.value or command_line.default_workdir(*named))
        job = Sweep(config, Workdir(path))
        with job.folder.locked(), caught_signals() as signals:
            status = job.run(signals)
    except UserError as error:
        command_line.fail(error)
    sys.exit(status)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
