"""Figure 2 of DP-Mix: how large gradients are before the clip, by method and stage."""

from collections.abc import Mapping, Sequence

import matplotlib.figure
import numpy as np

from dpmix_jax.run import diagnostics
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sweeps import plots
from dpmix_jax.sweeps.grid import Record, SweepConfig

_BINS, _SHOWN = 80, 0.99  # the axis ends where so many of the parameters are seen
# From light to dark, as training goes on.
_COLOURS = dict(
    zip(
        map(str, diagnostics.STAGES),
        ("#DEEBF7", "#9ECAE1", "#6BAED6", "#3182BD", "#08519C"),
        strict=True,
    )
)

Magnitudes = Mapping[str, np.ndarray]  # by stage, see `diagnostics.means`


def write(sweep: SweepConfig, folder: Workdir, records: Sequence[Record]) -> None:
    """Writes nonprivate_figure2.png and .pdf of runs whose magnitudes are there."""
    found: dict[str, list[Magnitudes]] = {}
    for record in records:
        path = folder.path / str(record["workdir"]) / diagnostics.FOLDER
        if path.exists():
            seen = diagnostics.means(path, int(record["step"]))
            cell = record["row"], sweep.label(sweep.point_of(record))
            found.setdefault(", ".join(filter(None, cell)), []).append(seen)
    if found:
        plots.save(draw(sweep, found), folder, "nonprivate_figure2")


def draw(
    sweep: SweepConfig, found: Mapping[str, Sequence[Magnitudes]]
) -> matplotlib.figure.Figure:
    """Draws the density of magnitudes over parameters, a panel for each cell.

    Args:
      sweep: its config.
      found: the magnitudes of the runs of each cell, drawn as one sample.
    """
    pooled = {
        row: {
            stage: np.concatenate([seen[stage] for seen in runs]) for stage in runs[0]
        }
        for row, runs in found.items()
    }
    most = max(np.quantile(seen["all"], _SHOWN) for seen in pooled.values())
    edges = np.linspace(0.0, most or 1.0, _BINS + 1)
    size = (3.6 * len(pooled), 3.4)
    figure = matplotlib.figure.Figure(size, layout="constrained")
    panels = figure.subplots(1, len(pooled), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (row, seen) in zip(panels, pooled.items(), strict=True):
        density = {name: _density(values, edges) for name, values in seen.items()}
        axes.stairs(density.pop("all"), edges, fill=True, color="0.85", label="all")
        for stage, values in density.items():
            axes.stairs(values, edges, color=_COLOURS[stage], label=f"{stage} %")
        axes.set_title(row, fontsize=10)
        axes.set_xlabel("mean magnitude before the clip")
    panels[0].set_ylabel("density over parameters")
    panels[0].set_yscale("log")
    panels[-1].legend(fontsize=8, title="of the training", loc="upper right")
    figure.suptitle(sweep.title, fontsize=10)
    return figure


def _density(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Returns the share of values by width of each bin; some values lie in none."""
    counts, _ = np.histogram(values, edges)
    return counts / (len(values) * np.diff(edges))
