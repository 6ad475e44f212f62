"""Does the runs of a sweep, and goes on with what a stop has left."""

import contextlib
import json
import pathlib
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dpmix_jax.errors import UserError, require
from dpmix_jax.progress import duration, say
from dpmix_jax.run import build, ledger, plan, start
from dpmix_jax.run.config import ExperimentConfig, differences, to_dict
from dpmix_jax.run.experiment import caught_signals
from dpmix_jax.run.release import final_line
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sweeps import figure2, plots, tables
from dpmix_jax.sweeps.grid import Record, Run, SweepConfig
from dpmix_jax.sweeps.worker import last_line, log_of

Signals = Sequence[int]
# Does a run in a folder, or goes on with it; returns why it failed, or None.
RunOne = Callable[[ExperimentConfig, Workdir, Signals], str | None]
# As each run ends: the run, why it failed or None, and the seconds that it took.
Ended = Iterator[tuple[Run, str | None, float]]
# Does runs below a folder, up to the first signal.
RunAll = Callable[[Sequence[Run], pathlib.Path, Signals], Ended]


def launch(
    config: SweepConfig,
    path: pathlib.Path,
    run_one: RunOne | None = None,
    run_all: RunAll | None = None,
) -> int:
    """Does what is left of a sweep, or of a private selection if a run asks for one.

    Args:
      config: of the sweep.
      path: its folder.
      run_one: does one run, as `worker.Worker.run` does, after the other.
      run_all: does all that are left, as `cluster.Jobs.run` does, instead.

    Returns:
      The exit status: 0, 1 if a run failed, or 128 + n after signal n.

    Raises:
      UserError: for a config or data that a run would refuse, or a private selection
        by `run_all`; nothing has begun then.
    """
    folder, runs = Workdir(path), config.candidates()
    selects = any(run.config.privacy.selection is not None for run in runs)
    if selects:
        if run_one is None:
            raise UserError("--launcher does no private selection: leave it out")
        _check_candidates(runs)
        left = [] if (path / "selected").exists() else runs
    else:
        runs = config.runs()
        left = [run for run in runs if _is_left(Workdir(path / run.folder))]
        for run in runs:
            _check_metric(config.metric, run.config)
    _check_inputs(left)
    with folder.locked(), caught_signals() as signals:
        if run_all is None:
            assert run_one is not None
            run_all = _in_turn(run_one)
        if selects:
            assert run_one is not None
            status = _select(runs, folder, run_one, signals)
        else:
            status = _sweep(config, runs, folder, run_all, signals)
    if status > 128:
        say("stopped: the same command goes on from there")
    return status


def _is_left(workdir: Workdir) -> bool:
    """Whether a run has not ended; one whose results are damaged fails by itself."""
    with contextlib.suppress(UserError):
        return workdir.results() is None
    return False


def _in_turn(run_one: RunOne) -> RunAll:
    """Returns what does one run after the other."""

    def run_all(runs, path, signals):
        for run in runs:
            began = time.monotonic()
            why = run_one(run.config, Workdir(path / run.folder), signals)
            if signals:
                return
            yield run, why, time.monotonic() - began

    return run_all


def _check_metric(metric: str, config: ExperimentConfig) -> None:
    """Raises `UserError` for a metric that a run does not measure."""
    size, views = config.data.validation_size, config.evaluate.views
    gradients, what_for = config.diagnostics.gradients, f"for metric {metric!r}"
    if "validation" in metric:
        require(size > 0, "data.validation_size", size, f"positive {what_for}")
    if "views" in metric:
        require(views > 1, "evaluate.views", views, f"more than 1 {what_for}")
    if "gradient" in metric:
        require(gradients, "diagnostics.gradients", gradients, f"True {what_for}")


def _check_inputs(runs: Sequence[Run]) -> None:
    """Raises `UserError` unless the files that runs read are there, and fit."""
    num_records: dict[tuple, int] = {}
    for config in (run.config for run in runs):
        used = config.draws_public  # then classes matter
        inputs = config.data, config.public, config.finetune, used
        if inputs not in num_records:
            dataset, _ = start.read(config)
            config.finetune.checksums()  # reads the files of weights
            num_records[inputs] = len(dataset.train)
        config.privacy.sampling_prob(num_records[inputs])


def _eta(started: float, done: int, total: int) -> str:
    return duration((time.monotonic() - started) / done * (total - done))


def _sweep(
    config: SweepConfig,
    runs: Sequence[Run],
    folder: Workdir,
    run_all: RunAll,
    signals: Signals,
) -> int:
    """Does the runs that have not ended and prints the table; returns the status."""
    records: dict[Run, Record] = {}
    failures: dict[Run, str] = {}
    workdirs = {run: Workdir(folder.path / run.folder) for run in runs}

    def collect(run: Run) -> None:
        workdirs[run].check(run.config)  # a job may have waited since another sweep
        records[run] = tables.read_record(config, run, workdirs[run])

    def write() -> str:
        return tables.write(config, folder, [records[r] for r in runs if r in records])

    for run in runs:
        try:
            if workdirs[run].is_finished(run.config):
                collect(run)
        except UserError as error:
            failures[run] = str(error)
    total, started = len(runs), time.monotonic()
    say(f"{total} runs into {folder.path}, {len(records)} of them finished before")
    left = [run for run in runs if run not in records and run not in failures]
    ended = run_all(left, folder.path, signals)
    for done, (run, why, seconds) in enumerate(ended, 1):
        try:
            if why:
                _end_log(workdirs[run], why)
                raise UserError(why)
            collect(run)
            value = config.show(records[run][config.metric]) + config.unit
            outcome = f"{config.metric} {value}, {seconds:.0f} s"
        except UserError as error:
            failures[run], outcome = str(error), f"FAILED: {error}"
        write()
        number = f"{total - len(left) + done:>{len(str(total))}}/{total}"
        eta = _eta(started, done, len(left))
        say(f"run {number}  {run.name}: {outcome}; ETA {eta}")
    if signals:
        return 128 + signals[0]
    print(write(), end="", flush=True)
    for run, why in failures.items():
        say(f"failed: {run.name}: {why}")
    try:
        plots.write(config, folder, list(records.values()))
        figure2.write(config, folder, list(records.values()))
    except Exception as error:  # a picture is not worth the sweep
        say(f"no picture: {type(error).__name__}: {error}")
    return 1 if failures else 0


def _end_log(workdir: Workdir, why: str) -> None:
    """Ends the log of a run that failed with the reason, which a crash has not told."""
    log = log_of(workdir)
    if log.exists() and not last_line(log).startswith("error: "):
        with open(log, "a") as file:  # a bar may be its last line, without an end
            file.write(f"\nerror: {why}\n")


# Private selections.

# What candidates must have in common: all that the accountant sees, the records, and
# what counts as public. C is no part of it: noise is a multiple of the sensitivity.
_SHARED = (
    *("privacy.", "data.", "public", "finetune.encoder", "finetune.weights"),
    "performance.",  # of it, what changes the sum
)
_NOT_SHARED = "privacy.l2_clip_norm"


def _check_candidates(runs: Sequence[Run]) -> None:
    """Raises `UserError` unless these can be candidates of one private selection.

    The accountant takes them for the same mechanism, and the statement of the one that
    is selected speaks for all of them.
    """
    for config in (run.config for run in runs):
        if config.seed is not None:
            raise UserError(
                f"seed is {config.seed}: it must be None for privacy.selection, whose"
                " runs are released"
            )
        apart = [
            text
            for text in differences(to_dict(runs[0].config), to_dict(config))
            if text.startswith(_SHARED) and not text.startswith(_NOT_SHARED)
        ]
        if apart:
            raise UserError(
                "privacy.selection: candidates must not differ in what the accountant"
                f" sees, in records or in public data; these do: {', '.join(apart)}"
            )


def _select(
    points: Sequence[Run], folder: Workdir, run_one: RunOne, signals: Signals
) -> int:
    """Does the candidates, drawn from points of the grid, and leaves the best alone.

    Which candidates there are is decided, and kept, before the first begins: a
    selection that is stopped goes on with the same ones.

    Returns:
      The exit status.
    """
    selected = Workdir(folder.path / "selected")
    candidates = folder.path / plan.CANDIDATES
    if selected.results() is None:
        drawn = [points[point] for point in _plan(points, folder)]
        if not drawn:
            say(
                "nothing is released: the number of candidates was drawn as 0. To start"
                " over because of that would be another selection, not covered by this"
            )
            return 1
        candidates.mkdir(mode=0o700, exist_ok=True)
        workdirs = [Workdir(candidates / str(n)) for n in range(len(drawn))]
        pairs = enumerate(zip(drawn, workdirs, strict=True), 1)
        left = [(n, r, w) for n, (r, w) in pairs if not w.is_finished(r.config)]
        started = time.monotonic()
        for done, (n, run, workdir) in enumerate(left, 1):
            why = run_one(run.config, workdir, signals)
            if signals:
                return 128 + signals[0]
            if why:
                say(f"failed: candidate {n}: {why}")
                say("a selection needs them all: the same command tries again")
                return 1
            eta = _eta(started, done, len(left))
            say(f"nonprivate candidate {n}/{len(drawn)}; ETA {eta}")
        best = max(workdirs, key=lambda workdir: (workdir.results() or {})["score"])
        best.clean_up()
        best.path.rename(selected.path)
    config = plan.today(json.loads((selected.path / "config.json").read_text()))
    if all(differences(config, to_dict(run.config)) for run in points):
        raise UserError(
            f"workdir {folder.path} holds a selection among other settings: use another"
            " --workdir"
        )
    # The others are not covered by what the statement of the best one says, nor is
    # which of them were compiled.
    for path in (candidates, folder.path / ".jax_cache"):
        if path.exists():
            shutil.rmtree(path)
    (folder.path / plan.FILE).unlink(missing_ok=True)
    say(f"selected: {selected.path}; no other candidate is left there")
    say(final_line(selected.results() or {}), file=sys.stdout)
    return 0


def _plan(points: Sequence[Run], folder: Workdir) -> list[int]:
    """Returns the point of each candidate, drawn once and for all.

    The ledger has a line for the selection before there is a plan, and one more if a
    plan of an earlier version, or of another folder, is gone on with.
    """
    configs = [to_dict(run.config) for run in points]
    config = points[0].config
    dataset, public = start.read(config)
    assert dataset.validation is not None  # the config has seen to it
    files = config.finetune.checksums()
    digest = start.data_digest(dataset.train, public, files)
    read = [digest, dataset.validation.digest()]
    found = plan.read(folder.path)
    if found is None:
        there = sorted(file.name for file in folder.path.iterdir())
        if strange := [name for name in there if name[0] != "."]:
            raise UserError(
                f"workdir {folder.path} holds {strange[0]}: use a new or empty"
                " --workdir"
            )
        for run in points:  # what they would be refused for spends nothing
            run.config.augmentation.check_images(dataset.train.image_shape)
            drawn_from = public if run.config.draws_public else None
            build.make_pool(run.config, drawn_from)
        how = config.privacy.private_selection
        assert how is not None
        drawn = how.draw(len(points), np.random.default_rng(secrets.randbits(128)))
        found = {"points": configs, "read": read, "drawn": drawn}
    else:
        same = len(found["points"]) == len(configs) and found["read"] == read
        kept = map(plan.today, found["points"])
        if not same or any(map(differences, kept, configs)):
            raise UserError(
                f"workdir {folder.path} holds a selection that began with other"
                " settings or data: put those back, or use another --workdir"
            )
    if not plan.is_of(found, folder.path):
        privacy = config.privacy
        ledger.of(dataset).spend(
            privacy.calibrate(privacy.sampling_prob(len(dataset.train))),
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            workdir=str(folder.path.resolve()),
        )
        plan.write(folder.path, found)
    return found["drawn"]
