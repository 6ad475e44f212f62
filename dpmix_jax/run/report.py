"""The report of a finished run: one HTML file with its plots inside.

It shows only what may be released: nothing named `nonprivate/...`, no training record,
no timing, no seed. Test images and test accuracy are in it.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np

from dpmix_jax.baselines.microbatch_mixup import MicrobatchMixupConfig
from dpmix_jax.run.config import Method
from dpmix_jax.run.statement import round_up

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em;
       padding: 0 1em; color: #222; }
img { max-width: 100%; } table { border-collapse: collapse; }
td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; white-space: pre-wrap; }
figcaption { color: #555; }
"""


def plot_progress(metrics: Sequence[Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """Plots test accuracy (raw and EMA) and epsilon against updates.

    Args:
      metrics: lines of `metrics.jsonl`: dictionaries with `step`, `epsilon` and, where
        evaluated, `test/accuracy` and `test/accuracy_ema`.
    """
    figure = matplotlib.figure.Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    evaluated = [line for line in metrics if "test/accuracy" in line]
    for name, label in (("test/accuracy_ema", "EMA"), ("test/accuracy", "raw")):
        left.plot(
            [line["step"] for line in evaluated],
            [100 * line[name] for line in evaluated],
            marker="o",
            markersize=3,
            label=label,
        )
    left.set(xlabel="updates", ylabel="test accuracy (%)")
    left.legend()
    right.plot(
        [0] + [line["step"] for line in metrics],
        [0] + [line["epsilon"] for line in metrics],
    )
    right.set(xlabel="updates", ylabel="epsilon spent")
    for axes in (left, right):
        axes.grid(alpha=0.3)
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


def _inline(figure: matplotlib.figure.Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def row(cells, tag):
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f"<table><tr>{row(header, 'th')}</tr>{body}</table>"


def render(
    *,
    title: str,
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    sheet: np.ndarray,
    method: Method,
    class_names: Sequence[str],
    statement: str,
    config: Mapping[str, Any],
) -> str:
    """Returns the report as one self-contained HTML page.

    Args:
      title: of the page.
      results: of `results.json`.
      metrics: see `plot_progress`.
      sheet: augmentation set of one test image, see `plot_sheet`.
      method: that made the sheet.
      class_names: in the order of `results["per_class_accuracy_ema"]`.
      statement: the privacy statement, Markdown.
      config: resolved config, shown as JSON but for the seed, which is the key to the
        noise.
    """
    config = {key: value for key, value in config.items() if key != "seed"}
    summary = [
        ("test accuracy, EMA weights", f"{100 * results['test_accuracy_ema']:.2f} %"),
        ("test accuracy, raw weights", f"{100 * results['test_accuracy']:.2f} %"),
        ("epsilon", round_up(results["epsilon"])),
        ("delta", round_up(results["delta"])),
        ("sigma", f"{results['noise_multiplier']:.4g}"),
    ]
    classes = [
        (name, f"{100 * value:.1f}")
        for name, value in zip(
            class_names, results["per_class_accuracy_ema"], strict=True
        )
    ]
    num_views, num_public = method.num_views, method.num_public
    num_mixes = len(sheet) - num_views - num_public
    kinds = (
        ("view(s)", num_views),
        ("public image(s)", num_public),
        ("mix(es)", num_mixes),
    )
    members = ", ".join(f"{count} {kind}" for kind, count in kinds if count)
    of_groups = isinstance(method, MicrobatchMixupConfig)
    what = "a group of test images" if of_groups else "a test image"
    private = "group's" if of_groups else "record's"
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        _table(("result", ""), summary),
        _inline(
            plot_progress(metrics),
            "Test accuracy of raw and EMA weights, and epsilon spent, against updates.",
        ),
        "<h2>One augmentation set</h2>",
        _inline(
            plot_sheet(sheet, num_views, num_public),
            f"What {what} becomes in one update: {members}."
            f" A private {private} gradient is averaged over such a set before it is"
            " clipped.",
        ),
        "<h2>Accuracy by class (%)</h2>",
        _table(("class", "EMA"), classes),
        f"<pre>{html.escape(statement)}</pre>",
        f"<h2>Config</h2><pre>{html.escape(json.dumps(config, indent=2))}</pre>",
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(sections)}</body></html>\n"
    )
