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
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpmix_jax.config import (
    ExperimentConfig,
    check_keys,
    differences,
    flatten,
    to_dict,
)
from dpmix_jax.errors import UserError

Point = tuple[Any, ...]  # a value of each column


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a sweep.

    Attributes:
      row: its name.
      point: value of each column.
      seed: the same seed draws the same weights and batches in every row; None for a
        candidate of a private selection, whose seed is secret.
      flags: for `experiments/run.py`, without `--workdir`.
      folder: relative to the sweep's.
    """

    row: str
    point: Point
    seed: int | None
    flags: tuple[str, ...]
    folder: pathlib.Path


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
      metric: key of `results.json` or of the last line of `metrics.jsonl`.
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
            keys = sorted(["seed", *settings, *row, *self.common])
            for key, following in itertools.pairwise(keys):
                if key == following:
                    raise UserError(
                        f"rows.{name}: {key} is set twice, by two of rows, columns,"
                        " common (with --set) and seeds"
                    )
        folders = [run.folder for run in self.runs()]
        for folder in folders:
            if folders.count(folder) > 1:
                raise UserError(
                    f"rows or columns share the folder {folder}: rename one"
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
        column = _slug(self.label(point).replace(" = ", "="))
        row_folder = _slug(row.replace("=", " ")).lower()
        folder = pathlib.Path(row_folder, column, f"seed={seed}")
        return Run(
            row=row,
            point=point,
            seed=seed,
            flags=(f"--config={base}", *flags),
            folder=folder,
        )


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
    values = config.to_dict()
    check_keys(values, (field.name for field in dataclasses.fields(SweepConfig)))
    values = {"columns": {}, "common": {}, "paper": None, **values}
    for name, kind in (
        ("title", str),
        ("base", str),
        ("rows", tuple),
        ("columns", dict),
        ("common", dict),
        ("seeds", int),
        ("metric", str),
    ):
        if name not in values:
            raise UserError(f"{name} is missing from the config")
        if not isinstance(values[name], kind):
            raise UserError(
                f"{name} is {values[name]!r}: it must be of type {kind.__name__}"
            )
    rows: dict[str, Mapping[str, Any]] = {}
    for pair in values["rows"]:
        if not (isinstance(pair, tuple) and [*map(type, pair)] == [str, dict]):
            raise UserError(f"rows has {pair!r}: it must be a name and its settings")
        if pair[0] in rows:
            raise UserError(f"rows has {pair[0]!r} twice")
        rows[pair[0]] = flatten(pair[1])
    common = flatten(values["common"])
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set is {setting}: it must be <key>=<value>")
        common[key] = value
    return SweepConfig(
        **{
            **values,
            "rows": rows,
            "columns": flatten(values["columns"]),
            "common": common,
        }
    )


# What candidates must have in common: all that the accountant sees, the records, and
# what counts as public. C is no part of it: noise is a multiple of the sensitivity.
_SHARED = (
    "privacy.",
    "data.",
    "public",
    "finetune.encoder",
    "finetune.weights",
    "performance.",  # of it, what changes the sum
)
_NOT_SHARED = "privacy.l2_clip_norm"


def check_candidates(configs: Sequence[ExperimentConfig]) -> None:
    """Raises `UserError` unless these can be candidates of one private selection.

    The accountant takes them for the same mechanism, and the statement of the one that
    is selected speaks for all of them.
    """
    for config in configs:
        if config.seed is not None:
            raise UserError(
                f"seed is {config.seed}: it must be None for privacy.selection, whose"
                " runs are released"
            )
        apart = [
            text
            for text in differences(to_dict(configs[0]), to_dict(config))
            if text.startswith(_SHARED) and not text.startswith(_NOT_SHARED)
        ]
        if apart:
            raise UserError(
                "privacy.selection: candidates must not differ in what the accountant"
                f" sees, in records or in public data; these do: {', '.join(apart)}"
            )
