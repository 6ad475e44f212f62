"""Grids of runs over paired seeds: which runs there are.

A sweep's config is plain data. Rows are settings to compare, columns what to compare
them at: a column that is `{named}` in `base` fills it in, any other is a setting. This
one chooses a learning rate on validation records:

    {"title": "Learning rates", "base": "configs/digits.py:{epsilon}", "seeds": 3,
     "rows": (("DP-SGD", {"method.name": "dp_sgd"}), ("Self-Aug, K = 4", {...})),
     "columns": {"epsilon": ("1", "8"), "optimizer": {"learning_rate": (0.5, 1.0)}},
     "common": {"data": {"validation_size": 288}},
     "metric": "nonprivate/validation/accuracy_ema"}

With `privacy.selection` set, its cells are the points that candidates of a private
selection are drawn from; then `metric` and `seeds` play no part.
"""

import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpmix_jax.errors import UserError
from dpmix_jax.run.cli import load_experiment
from dpmix_jax.run.config import ExperimentConfig, check_keys, flatten

Point = tuple[Any, ...]  # a value of each column
# Of what a run writes into `results.json` and the last line of `metrics.jsonl`.
METRICS = (
    *("test_accuracy", "test_accuracy_ema", "nonprivate/validation/accuracy"),
    *("nonprivate/validation/accuracy_ema", "nonprivate/loss"),
    *(
        "nonprivate/clipped_fraction",
        "noise_multiplier",
        "nonprivate/images_per_second",
    ),
    "seconds",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    def config(self) -> ExperimentConfig:
        return load_experiment(self.flags)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A grid of rows and columns, and what is measured in it.

    Attributes:
      title: of the table.
      base: value of `--config`, with columns in braces where they belong.
      rows: settings by name (in a config, pairs: a ConfigDict would sort them).
      columns: values to go through, by setting.
      common: settings of every run.
      seeds: n, for the seeds 0 to n - 1.
      metric: one of `METRICS`.
      paper: `source`, and `cells` (row, value of each column, text) to print beside
        ours; or None.
    """

    title: str
    base: str
    rows: Mapping[str, Mapping[str, Any]]
    columns: Mapping[str, Sequence[Any]]
    common: Mapping[str, Any]
    seeds: int
    metric: str
    paper: Mapping[str, Any] | None

    def __post_init__(self):
        if not self.rows:
            raise UserError("rows is empty: it must have at least one row")
        if self.seeds < 1:
            raise UserError(f"seeds is {self.seeds}: it must be at least 1")
        for key, values in self.columns.items():
            if not isinstance(values, tuple | list) or not values:
                raise UserError(f"columns.{key} is {values!r}: it must be a list")
        for key in re.findall(r"{(.*?)}", self.base):
            if key not in self.columns:
                raise UserError(f"base is {self.base}: {key} is none of the columns")
        settings = [key for key in self.columns if f"{{{key}}}" not in self.base]
        for name, row in self.rows.items():
            for key in _repeated([*self.common, *settings, *row, "seed"]):
                raise UserError(
                    f"rows.{name}: {key} is set twice, by two of rows, columns, common"
                    " (with --set) and seeds"
                )
        for folder in _repeated([run.folder for run in self.candidates()]):
            raise UserError(
                f"rows or columns share the folder {folder.parent}: rename one"
            )
        if self.metric not in METRICS:
            raise UserError(
                f"metric is {self.metric!r}: it must be one of {', '.join(METRICS)}"
            )

    @property
    def points(self) -> list[Point]:
        return list(itertools.product(*self.columns.values()))

    @property
    def chooses(self) -> bool:
        """Whether it is there to choose settings, not to report test accuracies."""
        return self.metric.startswith("nonprivate/validation/")

    @property
    def unit(self) -> str:
        return " %" if "accuracy" in self.metric else ""

    def show(self, value: float, sign: str = "") -> str:
        """Writes a value of the metric in `unit`."""
        return f"{100 * value:{sign}.2f}" if self.unit else f"{value:{sign}.4f}"

    def label(self, point: Point) -> str:
        named = zip(self.columns, point, strict=True)
        return ", ".join(f"{key} = {value}" for key, value in named)

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

    def _run(self, row: str, point: Point, seed: int | None) -> Run:
        base, settings = self.base, dict(self.common)
        for key, value in zip(self.columns, point, strict=True):
            if f"{{{key}}}" in base:
                base = base.replace(f"{{{key}}}", str(value))
            else:
                settings[key] = value
        settings |= self.rows[row]
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
    kinds = {"title": str, "base": str, "seeds": int, "metric": str}
    kinds |= {"rows": tuple, "columns": dict, "common": dict}
    if "privacy" in config:
        raise UserError("the config is that of one run: it is for experiments/run.py")
    values = {"columns": {}, "common": {}, "paper": None, **config.to_dict()}
    check_keys(values, (*kinds, "paper"))
    for name, kind in kinds.items():
        if name not in values:
            raise UserError(f"{name} is missing from the config")
        if not isinstance(values[name], kind):
            raise UserError(
                f"{name} is {values[name]!r}: it must be of type {kind.__name__}"
            )
    for pair in values["rows"]:
        if not (isinstance(pair, tuple) and [*map(type, pair)] == [str, dict]):
            raise UserError(f"rows has {pair!r}: it must be a name and its settings")
    for name in _repeated([name for name, _ in values["rows"]]):
        raise UserError(f"rows has {name!r} twice")
    rows = {name: flatten(row) for name, row in values["rows"]}
    common = flatten(values["common"])
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set is {setting}: it must be <key>=<value>")
        common[key] = value
    columns = flatten(values["columns"])
    return SweepConfig(**{**values, "rows": rows, "columns": columns, "common": common})
