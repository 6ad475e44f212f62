"""Grids of runs over paired seeds: which runs there are, and tables of what came out.

A sweep's config is plain data. Rows are settings to compare, columns what to compare
them at: a column that is `{named}` in `base` fills it in, any other is a setting. This
one chooses a learning rate on validation records:

    {"title": "Learning rates", "base": "configs/digits.py:{epsilon}", "seeds": 3,
     "rows": (("DP-SGD", {"method.name": "dp_sgd"}), ("Self-Aug, K = 4", {...})),
     "columns": {"epsilon": ("1", "8"), "optimizer": {"learning_rate": (0.5, 1.0)}},
     "common": {"data": {"validation_size": 288}},
     "metric": "nonprivate/validation/accuracy_ema"}
"""

import csv
import dataclasses
import io
import itertools
import math
import pathlib
import re
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import scipy.stats

from dpmix_jax.config import check_keys, flatten
from dpmix_jax.errors import UserError
from dpmix_jax.workdir import Workdir

Point = tuple[Any, ...]  # a value of each column
Cells = Mapping[tuple[str, Point], Mapping[int, float]]  # the values by seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a sweep.

    Attributes:
      row: its name.
      point: value of each column.
      seed: the same seed draws the same weights and batches in every row.
      flags: for `experiments/run.py`, without `--workdir`.
      folder: relative to the sweep's.
    """

    row: str
    point: Point
    seed: int
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

    def _run(self, row: str, point: Point, seed: int) -> Run:
        base, settings = self.base, dict(self.common)
        for key, value in zip(self.columns, point, strict=True):
            if f"{{{key}}}" in base:
                base = base.replace(f"{{{key}}}", str(value))
            else:
                settings[key] = value
        settings |= {**self.rows[row], "seed": seed}
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


def read_record(sweep: SweepConfig, run: Run, workdir: Workdir) -> dict[str, Any]:
    """Returns a finished run as one line of the CSV.

    What was measured under the name of a column, as the epsilon that was spent, is
    named `measured_<name>`.
    """
    results = workdir.results()
    assert results is not None
    found = {
        key: value for line in workdir.metrics()[-1:] for key, value in line.items()
    }
    found.update(results)
    columns = dict(zip(sweep.columns, run.point, strict=True))
    keys = {"row": run.row, **columns, "seed": run.seed}
    measured = {
        f"measured_{key}" if key in keys else key: value
        for key, value in found.items()
        if isinstance(value, int | float | str)
    }
    if not isinstance(measured.get(sweep.metric), int | float):
        numbers = [key for key, value in measured.items() if not isinstance(value, str)]
        raise UserError(
            f"metric is {sweep.metric!r}: it must be one of {', '.join(numbers)}"
        )
    return {**keys, **measured, "workdir": str(run.folder)}


def to_csv(records: Iterable[Mapping[str, Any]]) -> str:
    """Returns a tidy CSV: one line for each run."""
    records = list(records)
    names = list(dict.fromkeys(key for record in records for key in record))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


# The tables. None says which row or column is best: that would be choosing by the test
# set.


def to_markdown(sweep: SweepConfig, records: Iterable[Mapping[str, Any]]) -> str:
    """Returns the tables of a sweep, of the runs that have finished."""
    records = list(records)
    cells: dict[tuple[str, Point], dict[int, float]] = {
        (row, point): {} for row in sweep.rows for point in sweep.points
    }
    for record in records:
        point = tuple(record[key] for key in sweep.columns)
        cells[record["row"], point][record["seed"]] = record[sweep.metric]
    total = len(cells) * sweep.seeds
    blocks = [
        [f"# {sweep.title}"],
        [
            f"`{sweep.metric}`{sweep.unit and ' in' + sweep.unit}, at the last update:"
            f" median (standard deviation) over {sweep.seeds} paired seeds."
        ],
        _table(*_summary(sweep, cells)),
        _notes(sweep, records),
        ["## Each cell"],
        _table(
            ("row", "column", "n", "median", "sd", "least", "greatest"),
            [
                [row, sweep.label(point), *_spread(sweep, by_seed.values())]
                for (row, point), by_seed in cells.items()
            ],
        ),
        ["## Paired differences"],
        _table(("", "column", "n", "mean", "sd", "p", "d"), _differences(sweep, cells)),
        [
            "Over runs of the same seed, which share initial weights and batches. p: of"
            " the two-sided paired t-test, not corrected for the number of differences."
            " d: Cohen's, mean over standard deviation of the differences."
        ],
    ]
    if len(records) < total:
        blocks.insert(2, [f"**{len(records)} of {total} runs have finished.**"])
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line).strip() + " |" for line in lines]


def _summary(sweep: SweepConfig, cells: Cells) -> tuple[list[str], list[list[str]]]:
    """Returns the table as a paper prints it, the paper's numbers beside ours."""
    cited = (sweep.paper or {}).get("cells", ())
    theirs = {tuple(map(str, cell[:-1])): cell[-1] for cell in cited}
    header, rows = [""], [[row] for row in sweep.rows]
    for point in sweep.points:
        header.append(", ".join(filter(None, (sweep.label(point), "ours"))))
        if theirs:
            header.append("paper")
        for line in rows:
            n, median, sd, *_ = _spread(sweep, cells[line[0], point].values())
            cell = "-" if n == "0" else f"{median} ({sd})"
            line.append(cell if n in ("0", str(sweep.seeds)) else f"{cell}, n = {n}")
            if theirs:
                line.append(theirs.get((line[0], *map(str, point)), "-"))
    return header, rows


def _notes(sweep: SweepConfig, records: Sequence[Mapping[str, Any]]) -> list[str]:
    places = sorted({f"{r.get('device')}, jax {r.get('jax')}" for r in records})
    lines = [f"- ours: run here, on {'; '.join(places)}."] if places else []
    if sweep.paper:
        lines.append(f"- paper: as printed, not run here. {sweep.paper['source']}")
    lines.append("- Known seeds: runs to be compared, not to be released.")
    lines.append("- Choosing among these runs is not covered by their epsilon.")
    return lines


def _spread(sweep: SweepConfig, values: Collection[float]) -> list[str]:
    """Returns n, median, standard deviation, least and greatest."""
    if not values:
        return ["0", "-", "-", "-", "-"]
    median, sd = sweep.show(statistics.median(values)), _sd(sweep, values)
    ends = [sweep.show(end) for end in (min(values), max(values))]
    return [str(len(values)), median, sd, *ends]


def _sd(sweep: SweepConfig, values: Collection[float]) -> str:
    return sweep.show(statistics.stdev(values)) if len(values) > 1 else "-"


def _differences(sweep: SweepConfig, cells: Cells) -> Iterator[list[str]]:
    for second, first in itertools.combinations(sweep.rows, 2):
        for point in sweep.points:
            a, b = cells[first, point], cells[second, point]
            values = [a[seed] - b[seed] for seed in a if seed in b]
            mean = sweep.show(statistics.fmean(values), "+") if values else "-"
            tests = ["-" if x is None else f"{x:.2g}" for x in paired_test(values)]
            names = [f"{first} less {second}", sweep.label(point)]
            yield [*names, str(len(values)), mean, _sd(sweep, values), *tests]


def paired_test(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns p of the two-sided paired t-test and Cohen's d of pairs.

    Args:
      differences: of pairs; for fewer than two, or all equal, neither is defined.
    """
    n = len(differences)
    # Accuracies are multiples of 1 / (number of test images): less is rounding.
    if n < 2 or (sd := statistics.stdev(differences)) < 1e-9:
        return None, None
    d = statistics.fmean(differences) / sd
    return float(2 * scipy.stats.t.sf(abs(d) * math.sqrt(n), n - 1)), d
