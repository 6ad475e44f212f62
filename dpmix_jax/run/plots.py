"""The figures of a report, and how a figure becomes a part of a page."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np

# Of the Okabe-Ito palette, whose colours colour-blind readers tell apart too.
_BLUE, _ORANGE = "#0072b2", "#d55e00"
MOST_NUMBERS = 20  # classes of which each cell of a confusion matrix has its number


def plot_progress(metrics: Sequence[Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """Plots test accuracy (raw and EMA) and epsilon against updates.

    Args:
      metrics: lines of `metrics.jsonl`: dictionaries with `step`, `epsilon` and, where
        evaluated, `test/accuracy` and `test/accuracy_ema`.
    """
    # One above the other: side by side they would be too small for a phone.
    figure = matplotlib.figure.Figure(figsize=(4.8, 4.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    evaluated = [line for line in metrics if "test/accuracy" in line]
    for name, label, style in (
        ("test/accuracy", "raw weights", {"color": _ORANGE, "linestyle": "--"}),
        ("test/accuracy_ema", "EMA weights", {"color": _BLUE}),
    ):
        above.plot(
            [line["step"] for line in evaluated],
            [100 * line[name] for line in evaluated],
            marker="o" if len(evaluated) <= 30 else None,
            markersize=3,
            label=label,
            **style,
        )
    above.set(ylabel="test accuracy (%)")
    above.legend(frameon=False, loc="lower right")
    below.plot(
        [0] + [line["step"] for line in metrics],
        [0] + [line["epsilon"] for line in metrics],
        color=_BLUE,
    )
    below.set(xlabel="updates", ylabel="epsilon spent", xlim=(0, None), ylim=(0, None))
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_sheet(
    images: np.ndarray, num_views: int, num_public: int = 0
) -> matplotlib.figure.Figure:
    """Draws an augmentation set: views in blue, public images green, mixes orange.

    Args:
      images: [K, H, W, C] with pixels in [0, 1]: views, public images, mixes.
      num_views: how many are views.
      num_public: how many are public images.
    """
    num_mixes = len(images) - num_views - num_public
    members = [
        (f"{kind} {i + 1}", colour)
        for kind, count, colour in (
            ("view", num_views, "tab:blue"),
            ("public", num_public, "tab:green"),
            ("mix", num_mixes, "tab:orange"),
        )
        for i in range(count)
    ]
    columns = min(len(images), 8)
    rows = -(-len(images) // columns)
    figure = matplotlib.figure.Figure(
        figsize=(1.1 * columns, 1.25 * rows), layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    pixels = np.clip(images if images.shape[-1] in (3, 4) else images[..., 0], 0, 1)
    for axes, image, (name, colour) in zip(grid, pixels, members, strict=False):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(name, size=8)
        axes.spines[:].set(color=colour, linewidth=2)
    for axes in grid[len(images) :]:
        axes.set_axis_off()
    return figure


def plot_confusion(
    confusion: np.ndarray, class_names: Sequence[str]
) -> matplotlib.figure.Figure:
    """Draws a confusion matrix: counts, coloured by their share of the true class.

    Classes have their names where these fit and numbers otherwise. Cells have counts
    where there are few classes; what never happened has neither colour nor number.

    Args:
      confusion: [O, O + 1] counts, from `evaluate.make_confusion`.
      class_names: O of them.
    """
    names = [_label(name) for name in class_names]
    predicted = [*names, "not finite"]
    if not confusion[:, -1].any():
        confusion, predicted = confusion[:, :-1], names
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(0.4 * len(names), 1.6, 6.4))  # inches
    points = 72 * side / len(names)  # of a cell
    size = min(9.0, 0.8 * points)
    named = size >= 5
    longest = max(len(name) for name in predicted) if named else 3
    upright = named and longest > 3
    beside = 0.4 + 0.07 * longest
    figure = matplotlib.figure.Figure(
        figsize=(
            points / 72 * len(predicted) + beside,
            side + (beside if upright else 0.6) + 0.7,
        ),
        layout="constrained",
    )
    axes = figure.subplots()
    image = axes.imshow(
        np.ma.masked_equal(shares, 0.0),
        cmap="magma_r",
        vmin=0,
        vmax=1,
        interpolation="none",
    )
    bar = figure.colorbar(image, location="top", aspect=40, shrink=0.9)
    bar.set_label("share of the true class", size=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.spines[:].set(color="0.8")
    if named:
        for axis, labels in ((axes.xaxis, predicted), (axes.yaxis, names)):
            axis.set_ticks(range(len(labels)), labels, size=size, parse_math=False)
        axes.tick_params(length=0)
        axes.tick_params(axis="x", rotation=90 if upright else 0)
    if len(names) <= MOST_NUMBERS:
        _write_counts(axes, confusion, shares, points)
    return figure


def _write_counts(
    axes: matplotlib.axes.Axes, confusion: np.ndarray, shares: np.ndarray, points: float
) -> None:
    """Writes the counts into cells that are so many points wide."""
    # A digit is about 0.6 times as wide as high.
    size = min(9.0, points / (0.7 * len(str(confusion.max()))))
    for i, j in np.argwhere(confusion).tolist():
        colour = "white" if shares[i, j] > 0.4 else "black"
        number = axes.text(j, i, str(confusion[i, j]), size=size, color=colour)
        number.set(ha="center", va="center")


def _label(name: str) -> str:
    """Returns a name that fits beside a figure, and that XML can hold."""
    seen = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    cut = f"{seen[:9]}\N{HORIZONTAL ELLIPSIS}{seen[-9:]}"
    return seen if len(seen) <= 18 else cut


def inline_svg(figure: matplotlib.figure.Figure, name: str, says: str) -> str:
    """Returns a figure as an `<svg>` element, the same for the same figure.

    Its text is text, in the font of whoever reads it. It is as wide as there is room,
    down to where text becomes illegible.

    Args:
      figure: to draw.
      name: what its ids begin with, so that those of two figures differ.
      says: what a screen reader reads in its place.
    """
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "svg.image_inline": True,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
    }
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The reader's font may have what the one to measure with lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(buffer, format="svg", dpi=200, metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        # HTML knows no namespaces.
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            key = key.rpartition("}")[2]
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = re.sub("^#", f"#{name}-", value)
            element.attrib[key] = value.replace("url(#", f"url(#{name}-")
    width = 96 * figure.get_figwidth()  # CSS pixels
    del root.attrib["width"], root.attrib["height"]
    root.attrib |= {"role": "img", "aria-label": says}
    root.attrib["style"] = f"max-width: {width:.0f}px; min-width: {width / 1.5:.0f}px"
    return ElementTree.tostring(root, encoding="unicode")
