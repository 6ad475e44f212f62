"""Runs in processes of their own, which a killed parent does not lose."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence

from dpmix_jax.errors import UserError
from dpmix_jax.files import locked
from dpmix_jax.run.experiment import DIVERGED


def run_process(
    program: pathlib.Path,
    flags: Sequence[str],
    workdir: pathlib.Path,
    *,
    cache: pathlib.Path,
    signals: Sequence[int],
) -> str | None:
    """Runs a run, or goes on with it; its log lies beside its workdir.

    Args:
      program: `experiments/run.py`.
      flags: for it, without `--workdir`.
      workdir: of the run.
      cache: folder of compiled code.
      signals: those caught so far; the first is handed on to the run.

    Returns:
      Why it failed, or None if it did not, or if a signal came before it began.
    """
    try:
        # A run that a killed parent has left running is waited for, not lost.
        stop = lambda: bool(signals)  # noqa: E731
        with locked(workdir, f"workdir {workdir}", wait=True, stop=stop):
            pass
    except UserError as error:
        return str(error)
    if signals:
        return None
    log = workdir.with_name(f"{workdir.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        # Its own process group: Ctrl-C reaches it once, from here.
        process = subprocess.Popen(
            [sys.executable, program, *flags, f"--workdir={workdir}"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
            env={"JAX_COMPILATION_CACHE_DIR": str(cache.resolve()), **os.environ},
        )
    status = _wait(process, log, signals)
    if status in (0, DIVERGED):  # a bad rate is a result too
        return None
    how = f"exit status {status}"
    if status < 0:
        how = f"killed by {signal.Signals(-status).name}"
    return f"{how}: {_last_line(log).removeprefix('error: ')} ({log})"


def _wait(process: subprocess.Popen, log: pathlib.Path, signals: Sequence[int]) -> int:
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
            print(
                f"\r\033[K{_last_line(log)[: columns - 1]}\r", end="", file=sys.stderr
            )


def _last_line(log: pathlib.Path) -> str:
    """Returns the last line of a log, of which nothing but the end is read."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
