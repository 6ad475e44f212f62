"""Grids of runs over paired seeds: which runs there are.

A sweep's config is plain data. Rows are settings to compare, columns what to compare
them at: a column that is `{named}` in `base` fills it in, any other is a setting. What
holds for some cells alone stands under `where`. This one is a ladder, of methods at
each epsilon, in which the base config knows the updates of an epsilon:

    {"title": "Methods", "base": "configs/digits.py:{epsilon}", "seeds": 5,
     "rows": (("DP-SGD", {"method.name": "dp_sgd"}), ("Self-Aug, K = 4", {...})),
     "columns": {"epsilon": ("1", "8")},
     "where": (({"row": "DP-SGD", "epsilon": "8"}, {"optimizer.learning_rate": 2.0}),),
     "common": {"privacy": {"expected_batch_size": 512}},
     "metric": "test_accuracy_ema", "baseline": "DP-SGD"}

A sweep that chooses a learning rate has a column `"optimizer": {"learning_rate": (0.5,
1.0)}`, `"data": {"validation_size": 288}` in `common` and
`"nonprivate/validation/accuracy_ema"` for its metric.

With `privacy.selection` set, the cells are the points that candidates of a private
selection are drawn from; then `metric`, `baseline` and `seeds` play no part.
"""

import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpmix_jax.errors import UserError, require
from dpmix_jax.run import config as run_config
from dpmix_jax.run.cli import load_experiment

Point = tuple[Any, ...]  # a value of each column
Record = Mapping[str, Any]  # a finished run: one line of the CSV
# Of what a run writes into `results.json` and the last line of `metrics.jsonl`.
METRICS = (
    "test_accuracy",
    "test_accuracy_ema",
    "test_accuracy_views",
    "test_accuracy_ema_views",
    "nonprivate/validation/accuracy",
    "nonprivate/validation/accuracy_ema",
    "nonprivate/loss",
    "nonprivate/clipped_fraction",
    "nonprivate/gradient_stddev",
    "noise_multiplier",
    "nonprivate/images_per_second",
    "seconds",
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One run of a sweep.

    Attributes:
      row: its name.
      point: value of each column.
      seed: the same seed draws the same weights and batches in every row; None for a
        candidate of a private selection, whose seed is secret.
      name: all of these, for messages.
      folder: relative to the sweep's.
      flags: for `experiments/run.py`, without `--workdir`.
      config: what these flags say; `UserError` if a run would refuse them.
    """

    row: str
    point: Point
    seed: int | None
    name: str
    folder: pathlib.Path
    flags: tuple[str, ...]

    @functools.cached_property
    def config(self) -> run_config.ExperimentConfig:
        return load_experiment(self.flags)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A grid of rows and columns, and what is measured in it.

    Attributes:
      title: of the table.
      base: value of `--config`, with columns in braces where they belong.
      rows: settings by name (in a config, pairs: a ConfigDict would sort them).
      columns: values to go through, by setting.
      where: settings of some cells: pairs of what these have in common, `row` or values
        of columns, and of their settings.
      common: settings of every run.
      seeds: n, for the seeds 0 to n - 1.
      metric: one of `METRICS`.
      baseline: the row that the others are compared with in pairs of the same seed;
        None compares every two rows.
      paper: `source`, and `cells` (row, value of each column, text) to print beside
        ours, or below where we have no such row; or None.
    """

    title: str
    base: str
    rows: dict
    columns: dict = dataclasses.field(default_factory=dict)
    where: tuple = ()
    common: dict = dataclasses.field(default_factory=dict)
    seeds: int
    metric: str
    baseline: str | None = None
    paper: dict | None = None

    def __post_init__(self):
        if not self.rows:
            raise UserError("rows is empty: it must have at least one row")
        require(self.seeds >= 1, "seeds", self.seeds, "at least 1")
        for key, values in self.columns.items():
            listed = isinstance(values, tuple | list) and bool(values)
            require(listed, f"columns.{key}", values, "a list")
        for key in re.findall(r"{(.*?)}", self.base):
            if key not in self.columns:
                raise UserError(f"base is {self.base}: {key} is none of the columns")
        one_of: list[tuple[str, Any, Iterable[Any]]] = [
            ("metric", self.metric, METRICS),
            ("baseline", self.baseline, (None, *self.rows)),
        ]
        allowed = {"row": self.rows, **self.columns}
        for cells, _ in self.where:
            run_config.check_keys(cells, allowed, "where.")
            one_of += [(f"where.{k}", v, allowed[k]) for k, v in cells.items()]
        for key, value, values in one_of:
            names = ", ".join(map(str, values))
            require(value in values, key, value, f"one of {names}")
        if self.paper is not None:
            self._check_paper(**self.paper)
        for folder in _repeated([run.folder for run in self.candidates()]):
            raise UserError(
                f"rows or columns share the folder {folder.parent}: rename one"
            )

    def _check_paper(self, source: str = "", cells: tuple = (), **others: Any) -> None:
        require(not others, "paper", [*others], "of keys source and cells alone")
        require(bool(source), "paper.source", source, "where the cells are printed")
        for cell in cells:  # those of other columns than these are not printed
            whole = len(cell) >= 2 and isinstance(cell[-1], str)
            allowed = "a row, values of columns and a text"
            require(whole, "paper.cells", tuple(cell), allowed)

    @property
    def points(self) -> list[Point]:
        return list(itertools.product(*self.columns.values()))

    @property
    def chooses(self) -> bool:
        """Whether it is there to choose settings, not to report test accuracies."""
        return self.metric.startswith("nonprivate/validation/")

    @property
    def published(self) -> dict[str, dict[Point, str]]:
        """What the paper prints, by row and point, of which all values are text."""
        rows: dict[str, dict[Point, str]] = {}
        for row, *point, text in (self.paper or {}).get("cells", ()):
            rows.setdefault(row, {})[tuple(map(str, point))] = text
        return rows

    @property
    def unit(self) -> str:
        return " %" if "accuracy" in self.metric else ""

    def show(self, value: float, sign: str = "") -> str:
        """Writes a value of the metric in `unit`."""
        if self.unit:
            return f"{100 * value:{sign}.2f}"
        return f"{value:{sign}{',.0f' if abs(value) >= 1000 else '#.4g'}}"

    def label(self, point: Point) -> str:
        named = zip(self.columns, point, strict=True)
        return ", ".join(f"{key} = {value}" for key, value in named)

    def point_of(self, record: Record) -> Point:
        """Returns the point of a finished run."""
        return tuple(record[key] for key in self.columns)

    def runs(self) -> list[Run]:
        """Lists the runs, seed by seed: a part of a sweep is a fair comparison too."""
        return [
            self._run(row, point, seed)
            for seed in range(self.seeds)
            for row in self.rows
            for point in self.points
        ]

    def candidates(self) -> list[Run]:
        """Lists the points of a private selection, whose runs have secret seeds."""
        return [self._run(row, at, None) for row in self.rows for at in self.points]

    def settings(self, row: str, point: Point) -> dict[str, Any]:
        """Returns what a cell sets beside `base` and `common`."""
        cell = dict(zip(self.columns, point, strict=True))
        given = [*self.rows[row].items()]
        given += [(k, v) for k, v in cell.items() if f"{{{k}}}" not in self.base]
        cell["row"] = row
        for cells, settings in self.where:
            if all(cell[key] == value for key, value in cells.items()):
                given += settings.items()
        for key in _repeated([*self.common, *(key for key, _ in given), "seed"]):
            raise UserError(
                f"rows.{row}: {key} is set twice, by two of rows, columns, where,"
                " common (with --set) and seeds"
            )
        return dict(given)

    def _run(self, row: str, point: Point, seed: int | None) -> Run:
        base = self.base
        for key, value in zip(self.columns, point, strict=True):
            base = base.replace(f"{{{key}}}", str(value))
        settings = self.common | self.settings(row, point)
        if seed is not None:
            settings["seed"] = seed
        flags = (f"--config.{key}={value}" for key, value in settings.items())
        label = self.label(point)
        return Run(
            row=row,
            point=point,
            seed=seed,
            name=", ".join(filter(None, (row, label, f"seed {seed}"))),
            flags=(f"--config={base}", *flags),
            folder=pathlib.Path(
                _slug(row.replace("=", " ")).lower(),
                _slug(label.replace(" = ", "=")),
                f"seed={seed}",
            ),
        )


def _repeated(items: Sequence[Any]) -> list[Any]:
    return [item for i, item in enumerate(items) if item in items[:i]]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=]+", "-", text).strip("-.")


def from_config_dict(config: Any, settings: Iterable[str] = ()) -> SweepConfig:
    """Builds a `SweepConfig` from a ConfigDict.

    Args:
      config: has the fields of `SweepConfig`, those with settings nested.
      settings: `<key>=<value>` for every run, before what `common` says.

    Raises:
      UserError: naming the first key that is unknown, missing or has a bad value.
    """
    if "privacy" in config:
        raise UserError("the config is that of one run: it is for experiments/run.py")
    values = {"columns": {}, "common": {}, **config.to_dict()}
    for name, kind in (("rows", str), ("where", dict)):
        pairs = values.get(name, ())
        require(isinstance(pairs, tuple), name, pairs, "of type tuple")
        for pair in pairs:
            if not (isinstance(pair, tuple) and [*map(type, pair)] == [kind, dict]):
                raise UserError(
                    f"{name} has {pair!r}: it must be a {kind.__name__} and a dict"
                )
        values[name] = tuple((first, run_config.flatten(pair)) for first, pair in pairs)
    for name in _repeated([name for name, _ in values["rows"]]):
        raise UserError(f"rows has {name!r} twice")
    values["rows"] = dict(values["rows"])
    for name in ("columns", "common"):
        require(isinstance(values[name], dict), name, values[name], "of type dict")
        values[name] = run_config.flatten(values[name])
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set is {setting}: it must be <key>=<value>")
        values["common"][key] = value
    return run_config.from_config_dict(values, SweepConfig)
