"""What came out of a sweep: a tidy CSV, tables of it, and the settings it chooses."""

import csv
import io
import itertools
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import scipy.stats

from dpmix_jax.errors import UserError
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sweeps.grid import Point, Record, Run, SweepConfig

Cells = Mapping[tuple[str, Point], Mapping[int, float]]  # the values by seed


def read_record(sweep: SweepConfig, run: Run, workdir: Workdir) -> Record:
    """Returns a finished run as one line of the CSV.

    What was measured under the name of a column, as the epsilon that was spent, is
    named `measured_<name>`. A sweep that chooses does not see test accuracies.

    Raises:
      UserError: if the run has not measured the metric of the sweep.
    """
    columns = dict(zip(sweep.columns, run.point, strict=True))
    record = {"row": run.row, **columns, "seed": run.seed}
    for found in (*workdir.metrics()[-1:], workdir.results() or {}):
        for key, value in found.items():
            hidden = sweep.chooses and key.startswith("test")
            if isinstance(value, int | float | str) and not hidden:
                record[f"measured_{key}" if key in columns else key] = value
    if sweep.metric not in record:
        raise UserError(
            f"metric is {sweep.metric!r}: workdir {workdir.path} has a finished run"
            " that has not measured it; use another --workdir"
        )
    return {**record, "workdir": str(run.folder)}


def write(sweep: SweepConfig, folder: Workdir, records: Sequence[Record]) -> str:
    """Writes CSV, tables and choice, as far as runs have ended; returns the table."""
    table = to_markdown(sweep, records)
    for name, text in (
        ("runs.csv", to_csv(records)),
        ("table.md", table),
        ("table.tex", to_latex(sweep, records)),
    ):
        folder.write(name, text, mode=0o600)  # losses of training records among them
    if chosen := choices(sweep, records):
        told = "this choice looked at the private records, and no epsilon covers it"
        content = {"choices": chosen, "privacy": told}
        folder.write_json("choice.json", content, mode=0o600)
    else:
        (folder.path / "choice.json").unlink(missing_ok=True)
    return table


def to_csv(records: Sequence[Record]) -> str:
    """Returns a line for each record, with a column for each key of any."""
    lines = io.StringIO()
    names = dict.fromkeys(key for record in records for key in record)
    writer = csv.DictWriter(lines, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return lines.getvalue()


def read(sweep: SweepConfig, path: pathlib.Path) -> list[Record]:
    """Returns the runs in a CSV that `write` has written.

    Columns of the sweep, the seed, the metric and the seconds are what they were; all
    else is text.

    Raises:
      UserError: for a file that is none, or of another sweep.
    """
    # A CSV has nothing for None.
    points = {
        tuple("" if value is None else str(value) for value in point): point
        for point in sweep.points
    }
    records: dict[tuple, Record] = {}
    try:
        for line in csv.DictReader(io.StringIO(path.read_text())):
            point = points[tuple(line[key] for key in sweep.columns)]
            if None in line:  # more cells than names
                raise ValueError
            values: dict[str, Any] = {k: v for k, v in line.items() if v}
            values |= dict(zip(sweep.columns, point, strict=True))
            values["seed"] = int(values["seed"])
            for key in (sweep.metric, "seconds"):
                values[key] = float(values[key])
            run = values["row"], point, values["seed"]
            if run[0] not in sweep.rows or run[2] not in range(sweep.seeds):
                raise ValueError
            if run in records:
                raise ValueError
            records[run] = values
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        raise UserError(
            f"{path}, line {len(records) + 2}: it must be a run of {sweep.title!r}, as"
            " its sweep has written it into runs.csv, and no other line the same run"
        ) from None
    if not records:
        raise UserError(f"{path}: it has no runs")
    return list(records.values())


def choices(sweep: SweepConfig, records: Iterable[Record]) -> list[dict[str, Any]]:
    """Chooses settings by the median over seeds, for each row.

    Columns in braces in `base`, such as epsilon, are given: there is a choice for each.

    Returns:
      `row`, what is `given`, the `settings` and their `median`, for each choice; of
      equal ones the first in the config. Nothing if the sweep does not choose, or while
      runs are missing.
    """
    cells = _cells(sweep, records)
    if not sweep.chooses or any(len(c) < sweep.seeds for c in cells.values()):
        return []
    best: dict[Any, dict[str, Any]] = {}
    for (row, point), by_seed in cells.items():
        named = dict(zip(sweep.columns, point, strict=True))
        given = {k: v for k, v in named.items() if f"{{{k}}}" in sweep.base}
        choice = {
            "row": row,
            "given": given,
            "settings": sweep.settings(row, point),
            "median": statistics.median(by_seed.values()),
        }
        first = best.setdefault((row, *given.values()), choice)
        if choice["median"] > first["median"]:
            first.update(choice)
    return list(best.values())


# The tables. Of sweeps that report test accuracies none says which row or column is
# best: that would be choosing by the test set.


def to_markdown(sweep: SweepConfig, records: Sequence[Record]) -> str:
    """Returns the tables of a sweep, of the runs that have finished."""
    cells, chosen = _cells(sweep, records), choices(sweep, records)
    total = len(cells) * sweep.seeds
    missing = f"**{len(records)} of {total} runs have finished.**"
    spreads = [
        [row, sweep.label(point), *_spread(sweep, by_seed.values())]
        for (row, point), by_seed in cells.items()
    ]
    blocks = [
        f"# {sweep.title}",
        f"`{sweep.metric}`{sweep.unit and ' in' + sweep.unit}, at the last update:"
        f" median (standard deviation) over {sweep.seeds} paired seeds.",
        missing if len(records) < total else "",
        markdown(*_summary(sweep, cells)),
        _notes(sweep, records),
        "## Chosen" if chosen else "",
        markdown(("row", "settings", "median"), _chosen(sweep, chosen)),
        "## Each cell",
        markdown(("row", "column", "n", "median", "sd", "least", "greatest"), spreads),
        "## Paired differences",
        markdown(
            ("", "column", "n", "mean", "sd", "p", "d"), _differences(sweep, cells)
        ),
        "Over runs of the same seed, which share initial weights and batches. p: of"
        " the two-sided paired t-test, not corrected for the number of differences."
        " d: Cohen's, mean over standard deviation of the differences.",
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


def to_latex(sweep: SweepConfig, records: Sequence[Record]) -> str:
    """Returns the first of these tables for LaTeX with the package booktabs."""
    header, rows = _summary(sweep, _cells(sweep, records))
    first, *others = (
        " & ".join(re.sub(r"([&%$#_{}])", r"\\\1", cell) for cell in row) + r" \\"
        for row in (header, *rows)
    )
    start = rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"
    lines = [start, r"\toprule", first, r"\midrule", *others, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def _cells(sweep: SweepConfig, records: Iterable[Record]) -> Cells:
    cells: dict[tuple[str, Point], dict[int, float]] = {
        (row, point): {} for row in sweep.rows for point in sweep.points
    }
    for record in records:
        point = record["row"], sweep.point_of(record)
        cells[point][record["seed"]] = record[sweep.metric]
    return cells


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table, or nothing for one without rows."""
    lines = [header, ["---"] * len(header), *rows]
    text = ["| " + " | ".join(line).strip() + " |" for line in lines]
    return "\n".join(text) if len(text) > 2 else ""


def _summary(sweep: SweepConfig, cells: Cells) -> tuple[list[str], list[list[str]]]:
    """Returns the table as a paper prints it, the paper's numbers beside ours.

    Rows that the paper alone has stand below.
    """
    theirs = sweep.published
    ours = [row for row in sweep.rows if row in theirs]
    header = [""]
    lines = {row: [row] for row in sweep.rows}
    lines |= {row: [f"published: {row}"] for row in theirs if row not in sweep.rows}
    for point in sweep.points:
        name = sweep.label(point), "ours" if ours or not theirs else ""
        header.append(", ".join(filter(None, name)))
        header += ["paper"] if ours else []
        for row, line in lines.items():
            cited = theirs.get(row, {}).get(tuple(map(str, point)))
            values = cells[row, point].values() if row in sweep.rows else []
            n, median, sd, *_ = _spread(sweep, values)
            cell = "-" if n == "0" else f"{median} ({sd})"
            cell = cell if n in ("0", str(sweep.seeds)) else f"{cell}, n = {n}"
            line += [cell, cited or "-"] if ours else [cited or cell]
    return header, list(lines.values())


def _notes(sweep: SweepConfig, records: Iterable[Record]) -> str:
    places = sorted({f"{r.get('device')}, jax {r.get('jax')}" for r in records})
    lines = [f"- ours: run here, on {'; '.join(places)}."] if places else []
    if sweep.paper:
        lines.append(f"- paper: as printed, not run here. {sweep.paper['source']}")
    lines.append("- Known seeds: runs to be compared, not to be released.")
    lines.append("- Choosing among these runs is not covered by their epsilon.")
    return "\n".join(lines)


def _chosen(sweep: SweepConfig, chosen: Iterable[Record]) -> Iterator[list[str]]:
    for choice in chosen:
        named = {**choice["given"], **choice["settings"]}.items()
        settings = ", ".join(f"{key} = {value}" for key, value in named)
        yield [choice["row"], settings, sweep.show(choice["median"])]


def _spread(sweep: SweepConfig, values: Collection[float]) -> list[str]:
    """Returns n, median, standard deviation, least and greatest."""
    shown = (statistics.median, statistics.stdev, min, max)
    return [str(len(values)), *(_show(sweep, f, values) for f in shown)]


def _show(
    sweep: SweepConfig,
    statistic: Callable[[Collection[float]], float],
    values: Collection[float],
    sign: str = "",
) -> str:
    """Writes a statistic of values, or "-" where there are too few for it."""
    try:
        return sweep.show(statistic(values), sign)
    except (ValueError, AttributeError):  # of NaN, stdev raises the latter
        return "-"


def _differences(sweep: SweepConfig, cells: Cells) -> Iterator[list[str]]:
    pairs = [(b, a) for a, b in itertools.combinations(sweep.rows, 2)]
    if (one := sweep.baseline) is not None:
        pairs = [(row, one) for row in sweep.rows if row != one]
    for (first, second), point in itertools.product(pairs, sweep.points):
        a, b = cells[first, point], cells[second, point]
        values = [a[seed] - b[seed] for seed in a if seed in b]
        yield [
            f"{first} less {second}",
            sweep.label(point),
            str(len(values)),
            _show(sweep, statistics.fmean, values, "+"),
            _show(sweep, statistics.stdev, values),
            *("-" if x is None else f"{x:.2g}" for x in paired_test(values)),
        ]


def paired_test(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns p of the two-sided paired t-test and Cohen's d of pairs.

    Args:
      differences: of pairs; for fewer than two, for all equal, and for one that is not
        finite, neither is defined.
    """
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None, None
    # Accuracies are multiples of 1 / (number of test images): less is rounding.
    if (sd := statistics.stdev(differences)) < 1e-9:
        return None, None
    p = scipy.stats.ttest_1samp(differences, 0.0).pvalue
    return float(p), statistics.fmean(differences) / sd
