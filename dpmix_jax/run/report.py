"""The report of a finished run: one HTML file with its figures inside.

It shows only what may be released: nothing named `nonprivate/...`, no training record,
no timing, no seed. Test images and how they are classified are in it. It loads nothing
and runs nothing.
"""

import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import markdown_it
import matplotlib.figure
import numpy as np

from dpmix_jax.baselines.microbatch_mixup import MicrobatchMixupConfig
from dpmix_jax.run import plots
from dpmix_jax.run.config import Method
from dpmix_jax.run.statement import round_up

# Figures are dark on white, whatever the page is. What is wider than the page scrolls
# in a box of its own.
_STYLE = """
:root { color-scheme: light dark; -webkit-text-size-adjust: 100%;
        text-size-adjust: 100%; }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 46rem;
       padding: 1rem; overflow-wrap: break-word; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
figure { margin: 1.5em 0; }
figcaption { font-size: .9em; margin-top: .5em; opacity: .8; }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2em .8em; border-bottom: 1px solid #8884; text-align: right; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
li { margin: .4em 0; }
summary { cursor: pointer; }
pre { background: #8882; padding: 1em; overflow-x: auto; font-size: .85em; }
@media print { :root { color-scheme: light; } figure, tr { break-inside: avoid; } }
"""

# Settings that are paths.
_FILES = [
    *(("data", "path"), ("public", "path")),
    *(("finetune", "encoder"), ("finetune", "weights")),
]

# Only what a statement uses: with more, a name in it could become a link or an image.
_MARKDOWN = markdown_it.MarkdownIt("zero").enable(
    ["heading", "list", "emphasis", "backticks"]
)


def _typeset(statement: str) -> str:
    """Returns the HTML of a privacy statement, its title one level lower."""
    # Joined lines, or one that happens to begin with a dash would be a list of its own.
    joined = statement.replace("\n  ", " ")
    return _MARKDOWN.render(f"#{joined}" if joined.startswith("#") else joined)


def _shown(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns of a config what anybody may know."""
    shown = {key: value for key, value in config.items() if key != "seed"}
    for group, key in _FILES:
        if path := (shown.get(group) or {}).get(key):
            shown[group] = {**shown[group], key: pathlib.Path(path).name}
    return shown


def _figure(figure: matplotlib.figure.Figure, name: str, caption: str) -> str:
    return (
        f'<figure><div class="wide">{plots.inline_svg(figure, name, caption)}</div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def row(cells, tag):
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="wide"><table><tr>{row(header, "th")}</tr>{body}</table></div>'


def _folded(title: str, content: str, *, opened: bool = False) -> str:
    """Returns a section that a reader opens and closes."""
    start = "<details open>" if opened else "<details>"
    return f"{start}<summary>{html.escape(title)}</summary>{content}</details>"


def most_confused(
    confusion: np.ndarray, class_names: Sequence[str]
) -> list[tuple[str, str, int, float]]:
    """Lists the ten most frequent confusions: true and predicted class, count, share.

    Args:
      confusion: [O, O + 1], see `plots.plot_confusion`.
      class_names: O of them.
    """
    wrong = confusion * (1 - np.eye(*confusion.shape, dtype=confusion.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:10]
    places = zip(*np.unravel_index(order, wrong.shape), strict=True)
    names = [*class_names, "not finite"]
    return [
        (names[i], names[j], int(wrong[i, j]), wrong[i, j] / confusion[i].sum())
        for i, j in places
        if wrong[i, j]
    ]


def _confusions(confusion: np.ndarray, class_names: Sequence[str]) -> str:
    """Returns the section on which classes are taken for which."""
    few = len(class_names) <= plots.MOST_NUMBERS
    caption = (
        f"Confusion matrix of {confusion.sum():,} test images, by EMA weights: "
        + ("counts, and as colour " if few else "")
        + "the share of each true class that is taken for a predicted one."
        + ("" if few else " Classes are in the order of the table below.")
    )
    pairs = [
        (f"{true} taken for {predicted}", count, f"{100 * share:.1f}")
        for true, predicted, count, share in most_confused(confusion, class_names)
    ]
    header = ("most frequent confusions", "test images", "share (%)")
    drawn = plots.plot_confusion(confusion, class_names)
    table = "" if few or not pairs else _table(header, pairs)
    return _figure(drawn, "confusion", caption) + table


def _augmentation_set(sheet: np.ndarray, method: Method) -> str:
    """Returns the section on what one update makes of an image."""
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
    return _figure(
        plots.plot_sheet(sheet, num_views, num_public),
        "sheet",
        f"What {what} becomes in one update: {members}. A private {private} gradient is"
        " averaged over such a set before it is clipped.",
    )


def render(
    *,
    title: str,
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    confusion: np.ndarray,
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
      metrics: see `plots.plot_progress`.
      confusion: [O, O + 1] of the test records, by EMA weights, see
        `evaluate.make_confusion`.
      sheet: augmentation set of one test image, see `plots.plot_sheet`.
      method: that made the sheet.
      class_names: in the order of `confusion`.
      statement: the privacy statement, Markdown.
      config: resolved config, shown as JSON without the seed, which is the key to the
        noise, and without the folders of files.
    """
    config = _shown(config)
    summary = [
        ("test accuracy, EMA weights", f"{100 * results['test_accuracy_ema']:.2f} %"),
        ("test accuracy, raw weights", f"{100 * results['test_accuracy']:.2f} %"),
        ("epsilon", round_up(results["epsilon"])),
        ("delta", round_up(results["delta"])),
        ("sigma", f"{results['noise_multiplier']:.4g}"),
    ]
    accuracies = results["per_class_accuracy_ema"]
    classes = [
        (name, f"{count:,}", f"{100 * accuracy:.1f}")
        for name, count, accuracy in zip(
            class_names, confusion.sum(axis=1), accuracies, strict=True
        )
    ]
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        _table(("result", ""), summary),
        _figure(
            plots.plot_progress(metrics),
            "progress",
            "Test accuracy of raw and EMA weights, and epsilon spent, against updates.",
        ),
        "<h2>Confusion matrix</h2>",
        _confusions(confusion, class_names),
        _folded(
            "Accuracy by class, EMA weights",
            _table(("class", "test images", "accuracy (%)"), classes),
            opened=len(classes) <= plots.MOST_NUMBERS,
        ),
        "<h2>One augmentation set</h2>",
        _augmentation_set(sheet, method),
        _typeset(statement),
        "<h2>Config</h2>",
        _folded(
            "All settings",
            f"<pre>{html.escape(json.dumps(config, indent=2))}</pre>",
        ),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(sections)}</body></html>\n"
    )
