"""A process in which one run after another is done, and which may die with a run."""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import jax

from dpmix_jax.errors import UserError
from dpmix_jax.files import locked
from dpmix_jax.run import experiment, performance
from dpmix_jax.run.workdir import Workdir


class Worker(contextlib.AbstractContextManager):
    """Does runs in a process of its own, in which JAX starts once and not for each.

    The process starts with the first run. A run that crashes ends the process, and the
    next run starts another. If the process of the sweep is killed, the run that is
    being done goes on to its end.

    Args:
      cache: folder of compiled code.
      run: does a run, given its config and workdir, and returns its exit status.
    """

    def __init__(
        self,
        cache: pathlib.Path,
        run: Callable[[Any, Workdir], int] = experiment.run,
    ):
        self._cache, self._run = cache, run
        self._pipe: Connection | None = None

    def run(self, config: Any, workdir: Workdir, signals: Sequence[int]) -> str | None:
        """Does a run, or goes on with it; its log lies beside its workdir.

        Args:
          config: of the run.
          workdir: of the run.
          signals: those caught so far; the first is handed on to the run.

        Returns:
          Why it failed, or None if it did not, or if a signal came before it began.
        """
        path = workdir.path
        try:
            # A run that a killed sweep has left running is waited for, not lost.
            stop = lambda: bool(signals)  # noqa: E731
            with locked(path, f"workdir {path}", wait=True, stop=stop):
                pass
        except UserError as error:
            return str(error)
        if signals:
            return None
        log = log_of(workdir)
        log.touch(mode=0o600)  # losses of training records will be in it
        try:
            pipe = self._pipe or self._start()
            pipe.send((config, workdir))
            self._wait(pipe, log, signals)
            why = pipe.recv()
        except (EOFError, OSError):
            why = f"{self._end()}: {last_line(log)}"
        return why and f"{why} ({log})"

    def __exit__(self, *error: object) -> None:
        if self._pipe is not None:
            self._end()

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._run, self._cache)
        )
        self._process.start()
        theirs.close()
        return self._pipe

    def _end(self) -> str:
        """Waits for the process to end; returns how it did."""
        assert self._pipe is not None
        self._pipe.close()
        self._pipe = None
        self._process.join()
        status = self._process.exitcode or 0
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}"

    def _wait(
        self, pipe: Connection, log: pathlib.Path, signals: Sequence[int]
    ) -> None:
        """Waits for a run, hands it the first signal, and shows its progress."""
        live, handed_on = sys.stderr.isatty(), False
        while not pipe.poll(0.2):
            if signals and not handed_on:
                os.kill(self._process.pid or 0, signals[0])
                handed_on = True
            if live:
                columns = os.get_terminal_size(sys.stderr.fileno()).columns
                line = last_line(log)[: columns - 1]
                print(f"\r\033[K{line}\r", end="", file=sys.stderr)
        print("\r\033[K" if live else "", end="", file=sys.stderr)


def _serve(
    pipe: Connection, run: Callable[[Any, Workdir], int], cache: pathlib.Path
) -> None:
    """Does the runs that come through a pipe, and answers why each failed, or None.

    It returns once the other end is closed, as by a kill. A user's mistake is an
    answer; any other exception ends the process.
    """
    os.setpgid(0, 0)  # Ctrl-C reaches a run once, handed on by the sweep
    performance.keep_compiled_code(cache.resolve())
    while True:
        try:
            config, workdir = pipe.recv()
        except (EOFError, OSError):
            return
        why = attempt(run, config, workdir)
        jax.clear_caches()  # else memory grows from run to run
        with contextlib.suppress(BrokenPipeError):  # the sweep was killed meanwhile
            pipe.send(why)


def attempt(
    run: Callable[[Any, Workdir], int], config: Any, workdir: Workdir
) -> str | None:
    """Does a run in this process, whose output goes to its log from now on.

    Args:
      run: does it, and returns its exit status.
      config: of the run.
      workdir: of the run.

    Returns:
      Why it failed, or None if it did not.
    """
    with open(log_of(workdir), "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        status = run(config, workdir)
    except (UserError, OSError) as error:
        why = " ".join(str(error).split())
        print("error:", why, flush=True)
        return why
    if status in (0, experiment.DIVERGED):  # a bad rate is a result too
        return None
    return f"exit status {status}"


def log_of(workdir: Workdir) -> pathlib.Path:
    """Returns the log of a run, which lies beside its workdir."""
    return workdir.path.with_name(f"{workdir.path.name}.log")


def last_line(log: pathlib.Path) -> str:
    """Returns the last line of a log, of which nothing but the end is read."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
