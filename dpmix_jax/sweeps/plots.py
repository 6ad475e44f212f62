"""A sweep drawn: its metric against the numbers of a column, and against seconds."""

import io
import itertools
import statistics
from collections.abc import Sequence

import matplotlib.axes
import matplotlib.figure

from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sweeps.grid import Record, SweepConfig

# Apart for the colour-blind (Okabe and Ito, 2008); in black and white by markers.
_STYLES = [
    *(("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "D"), ("#CC79A7", "^")),
    *(("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X")),
]


def write(sweep: SweepConfig, folder: Workdir, records: Sequence[Record]) -> None:
    """Writes plot.png and plot.pdf of the runs that have finished, if any have."""
    if records:
        save(draw(sweep, records), folder, "plot")


def save(figure: matplotlib.figure.Figure, folder: Workdir, name: str) -> None:
    """Writes a figure as `<name>.png` and `<name>.pdf`."""
    for kind in ("png", "pdf"):
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=200)
        folder.write(f"{name}.{kind}", file.getvalue(), mode=0o600)


def draw(sweep: SweepConfig, records: Sequence[Record]) -> matplotlib.figure.Figure:
    """Draws medians over seeds, with bars from the least to the greatest.

    A sweep with one column, of numbers, is drawn against it, with what others published
    dashed; every sweep is drawn against the median of the seconds that a run took.

    Args:
      sweep: its config.
      records: the runs that have finished.
    """
    column = _column_of_numbers(sweep)
    labels = ["seconds of a run"] if column is None else [column, "seconds of a run"]
    size = (4.5 * len(labels), 3.8)
    figure = matplotlib.figure.Figure(size, layout="constrained")
    panels = figure.subplots(1, len(labels), squeeze=False, sharey=True)[0]
    styles = zip(sweep.rows, itertools.cycle(_STYLES), strict=False)
    for row, style in styles:
        cells = [
            [r for r in records if r["row"] == row and sweep.point_of(r) == point]
            for point in sweep.points
        ]
        _line(panels[-1], sweep, row, style, cells, "seconds")
        if column is not None:
            _line(panels[0], sweep, row, style, cells, column)
    if column is not None:
        _published(panels[0], sweep)
    panels[0].set_ylabel(f"{sweep.metric}{sweep.unit and ' in' + sweep.unit}")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[-1].set_xlim(left=0)
    panels[-1].legend(fontsize=8)
    return figure


def _column_of_numbers(sweep: SweepConfig) -> str | None:
    """Returns the one column of a sweep if its values are two numbers or more."""
    if len(sweep.columns) != 1:
        return None
    ((name, values),) = sweep.columns.items()
    try:
        return name if len({float(value) for value in values}) > 1 else None
    except (TypeError, ValueError):
        return None


def _line(
    axes: matplotlib.axes.Axes,
    sweep: SweepConfig,
    row: str,
    style: tuple[str, str],
    cells: Sequence[Sequence[Record]],
    key: str,
) -> None:
    """Draws the cells of a row that have runs, by the median of `key`."""
    scale = 100 if sweep.unit else 1
    found = [
        (
            statistics.median(float(record[key]) for record in cell),
            sorted(scale * record[sweep.metric] for record in cell),
        )
        for cell in cells
        if cell
    ]
    if not found:
        return
    places, values = zip(*sorted(found), strict=True)
    medians = [statistics.median(of_cell) for of_cell in values]
    pairs = list(zip(medians, values, strict=True))
    spread = [m - v[0] for m, v in pairs], [v[-1] - m for m, v in pairs]
    colour, marker = style
    axes.errorbar(
        places, medians, spread, color=colour, marker=marker, label=row, capsize=2
    )


def _published(axes: matplotlib.axes.Axes, sweep: SweepConfig) -> None:
    """Draws rows of others, each with its name at its last value."""
    for row, cells in sweep.published.items():
        if row in sweep.rows or "accuracy" not in sweep.metric:
            continue
        numbers = [(float(p[0]), float(text.split()[0])) for p, text in cells.items()]
        places, values = zip(*numbers, strict=True)
        axes.plot(places, values, ".--", color="0.55", linewidth=1)
        axes.annotate(
            row,
            (places[-1], values[-1]),
            xytext=(4, -3),
            textcoords="offset points",
            fontsize=7,
            color="0.35",
        )
