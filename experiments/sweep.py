"""Runs a grid of experiments over paired seeds and prints its table.

    python experiments/sweep.py --config=configs/table11.py:digits --config.seeds=3

`dpmix_jax/sweep.py` shows what a sweep's config holds. Each run is a process of its
own, with its log beside its workdir: one that fails is reported, and the rest go on.
Started again with the same command, a sweep that was stopped goes on where it was;
finished runs are not repeated. `runs.csv` and `table.md` in the workdir are rewritten
after each run; where the metric is of validation records, `choice.json` says which
settings come out.

    python experiments/sweep.py --config=configs/rates.py:vit_b16:cifar10-1 \
        --set=privacy.selection=geometric --set=privacy.expected_candidates=10

makes a private selection of the same grid: it runs a random number of candidates, keeps
the best by a noisy count of correct validation records in `selected/`, deletes all
others, and the epsilon of the model that is left covers the whole search.
"""

import json
import pathlib
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from dpmix_jax import command_line, data, sweep, tables
from dpmix_jax.config import ExperimentConfig, differences, to_dict
from dpmix_jax.data.public import load_public
from dpmix_jax.errors import UserError
from dpmix_jax.experiment import caught_signals, data_digest, final_line
from dpmix_jax.files import write_atomically
from dpmix_jax.processes import attempt
from dpmix_jax.progress import duration, say
from dpmix_jax.workdir import Workdir

RUN = pathlib.Path(__file__).with_name("run.py")
NOT_COVERED = {
    "privacy": "this choice looked at the private records, and no epsilon covers it"
}

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
            self.records[i] = tables.read_record(self.config, self.runs[i], workdir)

    def _tabulate(self) -> str:
        records = [self.records[i] for i in sorted(self.records)]
        table = tables.to_markdown(self.config, records)
        self.folder.write("runs.csv", tables.to_csv(records))
        self.folder.write("table.md", table)
        chosen = tables.choices(self.config, records)
        if chosen:
            self.folder.write_json("choice.json", {"choices": chosen, **NOT_COVERED})
        else:
            (self.folder.path / "choice.json").unlink(missing_ok=True)
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
        return attempt(
            RUN,
            self.runs[i].flags,
            self._workdir(i).path,
            cache=self.folder.path / ".jax_cache",
            signals=signals,
        )


class Selection:
    """A private selection: candidates drawn at random, of which the best stays.

    Which candidates there are is decided, and kept, before the first begins: a
    selection that is stopped goes on with the same ones.
    """

    def __init__(self, config: sweep.SweepConfig, folder: Workdir):
        self.folder, self.points = folder, [run.flags for run in config.candidates()]
        self.expected = [command_line.load_experiment(flags) for flags in self.points]
        sweep.check_candidates(self.expected)
        self.selected = Workdir(folder.path / "selected")
        self.candidates = folder.path / "candidates"

    def run(self, signals: Sequence[int]) -> int:
        """Does what is left; returns the exit status, 128 + n after signal n."""
        if self.selected.results() is None:
            plan = self._plan()
            status = self._run_candidates(plan, signals)
            if status:
                return status
            best = self._workdir(max(range(len(plan)), key=self._score))
            best.clean_up()
            best.path.rename(self.selected.path)
        if not any(self._is_of(self.selected, config) for config in self.expected):
            raise UserError(
                f"workdir {self.folder.path} holds a selection among other settings:"
                " use another --workdir"
            )
        # The others are not covered by what the statement of the best one says, nor is
        # which of them were compiled.
        for path in (self.candidates, self.folder.path / ".jax_cache"):
            if path.exists():
                shutil.rmtree(path)
        (self.folder.path / "plan.json").unlink(missing_ok=True)
        say(f"selected: {self.selected.path}; no other candidate is left there")
        results = self.selected.results()
        assert results is not None
        say(final_line(results), file=sys.stdout)
        return 0

    def _workdir(self, n: int) -> Workdir:
        return Workdir(self.candidates / str(n))

    def _score(self, n: int) -> int:
        results = self._workdir(n).results()
        assert results is not None
        return results["score"]

    @staticmethod
    def _is_of(workdir: Workdir, config: ExperimentConfig) -> bool:
        try:
            workdir.check(config)
        except UserError:
            return False
        return True

    def _plan(self) -> list[int]:
        """Returns the point of each candidate, drawn once and for all."""
        path = self.folder.path / "plan.json"
        points = [to_dict(config) for config in self.expected]
        read = checksums(self.expected[0])
        if path.exists():
            kept = json.loads(path.read_text())
            same = len(kept["points"]) == len(points) and kept["read"] == read
            if not same or any(map(differences, kept["points"], points)):
                raise UserError(
                    f"workdir {self.folder.path} holds a selection that began with"
                    " other settings or data: put those back, or use another --workdir"
                )
            return kept["drawn"]
        found = sorted(file.name for file in self.folder.path.iterdir())
        if strange := [name for name in found if name[0] != "."]:
            raise UserError(
                f"workdir {self.folder.path} holds {strange[0]}: use a new or empty"
                " --workdir"
            )
        how = self.expected[0].privacy.private_selection
        assert how is not None
        rng = np.random.default_rng(secrets.randbits(128))
        drawn = how.draw(len(self.points), rng)
        plan = {"points": points, "read": read, "drawn": drawn}
        write_atomically(path, json.dumps(plan), mode=0o600)
        return drawn

    def _run_candidates(self, plan: Sequence[int], signals: Sequence[int]) -> int:
        """Runs those that have not finished; returns the exit status."""
        if not plan:
            say(
                "nothing is released: the number of candidates was drawn as 0. To start"
                " over because of that would be another selection, not covered by this"
            )
            return 1
        self.candidates.mkdir(mode=0o700, exist_ok=True)
        started, done = time.time(), 0
        for n, point in enumerate(plan):
            workdir = self._workdir(n)
            if workdir.results() is not None:
                workdir.check(self.expected[point])
                continue
            error = attempt(
                RUN,
                self.points[point],
                workdir.path,
                cache=self.folder.path / ".jax_cache",
                signals=signals,
            )
            if signals:
                say("stopped: the same command goes on from there")
                return 128 + signals[0]
            if error is not None:
                say(f"failed: candidate {n + 1}: {error}")
                say("a selection needs them all: the same command tries again")
                return 1
            done += 1
            left = (len(plan) - n - 1) * (time.time() - started) / done
            say(f"nonprivate candidate {n + 1}/{len(plan)}; ETA {duration(left)}")
        return 0


def checksums(config: ExperimentConfig) -> list[str]:
    """Returns those of all that candidates read: they must read the same."""
    dataset = data.load(config.data)
    public = load_public(config.public, config.data, dataset)
    assert dataset.validation is not None  # the config has seen to it
    files = config.finetune.checksums()
    return [data_digest(dataset.train, public, files), dataset.validation.digest()]


def make_job(config: sweep.SweepConfig, folder: Workdir) -> Sweep | Selection:
    """Returns a private selection if a run asks for one, else a sweep."""
    loaded = (command_line.load_experiment(run.flags) for run in config.candidates())
    chosen = any(found.privacy.selection is not None for found in loaded)
    return Selection(config, folder) if chosen else Sweep(config, folder)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    try:
        named = command_line.config_file()
        config = sweep.from_config_dict(_CONFIG.value, _SET.value)
        path = pathlib.Path(_WORKDIR.value or command_line.default_workdir(*named))
        job = make_job(config, Workdir(path))
        with job.folder.locked(), caught_signals() as signals:
            status = job.run(signals)
    except UserError as error:
        command_line.fail(error)
    sys.exit(status)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
