"""How far the runs of a sweep are, told from their files alone."""

import pathlib
import shutil
import statistics
import sys
import time
from collections.abc import Sequence

from dpmix_jax.errors import UserError
from dpmix_jax.files import is_locked
from dpmix_jax.progress import duration
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sweeps.grid import Run, SweepConfig
from dpmix_jax.sweeps.worker import last_line, log_of

STATES = ("done", "running", "failed", "queued")


def watch(sweep: SweepConfig, path: pathlib.Path) -> None:
    """Prints how far a sweep is; on a terminal again and again, until all have ended.

    Args:
      sweep: its config.
      path: its folder, in which nothing is written.

    Raises:
      UserError: if there is no such folder, or for a private selection.
    """
    if any(run.config.privacy.selection for run in sweep.candidates()):
        raise UserError("--watch tells nothing of a private selection: leave it out")
    if not path.is_dir():
        raise UserError(f"--workdir is {path}: there is no such folder")
    runs, live = sweep.runs(), sys.stdout.isatty()
    while True:
        text, ended = screen(runs, path)
        if not live:
            print(text)
            return
        size = shutil.get_terminal_size()
        lines = [line[: size.columns] for line in text.splitlines()]
        print("\033[H\033[J" + "\n".join(lines[: size.lines - 1]), flush=True)
        if ended:
            return
        time.sleep(3.0)


def screen(runs: Sequence[Run], path: pathlib.Path) -> tuple[str, bool]:
    """Returns counts and what is to be seen, and whether all runs have ended.

    Args:
      runs: of the sweep.
      path: its folder.
    """
    found = [(run, *_state(run, Workdir(path / run.folder))) for run in runs]
    states = [state for _, state, _ in found]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES)
    lines = [f"{len(runs)} runs: {counts}; ETA {_eta(found, path)}"]
    for shown in ("failed", "running"):
        lines += [f"{s}  {run.name}: {told}" for run, s, told in found if s == shown]
    return "\n".join(lines), not {"running", "queued"} & {*states}


def _state(run: Run, workdir: Workdir) -> tuple[str, str]:
    """Returns the state of a run, and the last thing that it has said."""
    try:
        if workdir.is_finished(run.config):
            return "done", ""
    except UserError as error:  # results of another experiment
        return "failed", str(error)
    log = log_of(workdir)
    told = last_line(log) if log.exists() else ""
    if is_locked(workdir.path):
        return "running", told
    if told.startswith("error: "):
        return "failed", f"{told.removeprefix('error: ')} ({log})"
    return "queued", told


def _eta(found: Sequence[tuple[Run, str, str]], path: pathlib.Path) -> str:
    """Estimates the rest from the times of runs that are done, or under way."""
    whole, left = [], []  # seconds of a run, and of what is left of those running
    for run, state, _ in found:
        workdir = Workdir(path / run.folder)
        if state == "done":
            whole.append((workdir.results() or {}).get("seconds", 0.0))
        lines = workdir.metrics()[-2:] if state == "running" else []
        if len(lines) == 2:
            (first, last), updates = lines, run.config.privacy.num_updates
            seconds = max(0.0, last["seconds"] - first["seconds"])
            pace = seconds / (last["step"] - first["step"])
            whole.append(pace * updates)
            left.append(max(0.0, pace * (updates - last["step"])))
    states = [state for _, state, _ in found]
    running, queued = states.count("running"), states.count("queued")
    if not (running or queued):
        return duration(0.0)
    if not whole:
        return "-:--:--"
    mean = statistics.fmean(whole)
    rest = sum(left) + mean * (running - len(left) + queued)
    return duration(rest / max(running, 1))
