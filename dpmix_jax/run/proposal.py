"""A config for a folder of one's own images, and what to expect of it."""

import math
import pathlib
import statistics
import textwrap
from typing import Any, NamedTuple

import numpy as np

from dpmix_jax.data import folder, images
from dpmix_jax.data.trees import reading, scan
from dpmix_jax.errors import require

_LOOKED_AT = 500  # images at most, whose sizes are read
_LARGE = 48  # pixels of the shorter side, from which 64 do better than 32


class Found(NamedTuple):
    """What was seen of a folder of class folders.

    Attributes:
      num_records: that will be trained on.
      num_validation: that are held out of them, a tenth.
      num_classes: O.
      side: in pixels, that images are brought to.
    """

    num_records: int
    num_validation: int
    num_classes: int
    side: int


class Measured(NamedTuple):
    """What did best on validation records of a part of Fashion-MNIST.

    Attributes:
      num_records: N, of the part.
      sampling_prob: q.
      num_updates: T.
      learning_rates: by epsilon.
      accuracies: in %, by epsilon, mean of two noise seeds.
      without_noise: the accuracy of the same classifier without noise.
    """

    num_records: int
    sampling_prob: float
    num_updates: int
    learning_rates: dict[float, float]
    accuracies: dict[float, float]
    without_noise: float


# Scattering coefficients (J = 2, roots, 27 groups), a linear classifier, C = 0.1,
# momentum 0.9, sigma by RDP; the best of T = 50 and 150, and of rates in steps of four.
# Those images are public, so that this choice costs nothing.
_MEASURED = (
    Measured(
        *(300, 0.3, 50),
        learning_rates={1.0: 0.25, 4.0: 1.0, 8.0: 1.0},
        accuracies={1.0: 48.6, 4.0: 68.5, 8.0: 71.7},
        without_noise=82.0,
    ),
    Measured(
        *(1000, 0.3, 150),
        learning_rates={1.0: 0.25, 4.0: 1.0, 8.0: 1.0},
        accuracies={1.0: 68.0, 4.0: 79.8, 8.0: 81.1},
        without_noise=84.7,
    ),
    Measured(
        *(3000, 0.3, 150),
        learning_rates={1.0: 1.0, 4.0: 4.0, 8.0: 4.0},
        accuracies={1.0: 79.6, 4.0: 83.9, 8.0: 85.3},
        without_noise=86.6,
    ),
    Measured(
        *(10_000, 0.3, 150),
        learning_rates={1.0: 4.0, 4.0: 4.0, 8.0: 4.0},
        accuracies={1.0: 84.1, 4.0: 86.3, 8.0: 86.2},
        without_noise=87.3,
    ),
)


def look(path: pathlib.Path) -> Found:
    """Counts the images of a folder of class folders, and looks at their sizes.

    Raises:
      UserError: for a folder that `data.name=folder` does not read.
    """
    with reading(f"--images is {path}"):
        listing = folder.class_folders(scan(path))
        keys = [key for key, _ in listing.train]
        some = np.linspace(0, len(keys) - 1, min(len(keys), _LOOKED_AT)).astype(int)
        read = listing.contents([keys[i] for i in some])
        sides = [min(images.size(content, str(key))) for key, content in read]
    held_out = len(keys) // 10
    return Found(
        num_records=len(keys) - held_out,
        num_validation=held_out,
        num_classes=len(listing.class_names),
        side=64 if statistics.median(sides) >= _LARGE else 32,
    )


def propose(
    path: pathlib.Path, found: Found, *, epsilon: float, delta: float | None = None
) -> str:
    """Returns a config file: a linear classifier of scattering coefficients.

    Args:
      path: of the folder.
      found: in it.
      epsilon: of the budget, positive.
      delta: of the budget; None for a power of ten, at most 1e-5 and 1 / (10 N).

    Raises:
      UserError: for an epsilon or delta out of range.
    """
    require(0 < epsilon < math.inf, "--epsilon", epsilon, "positive and finite")
    require(delta is None or 0 < delta < 1, "--delta", delta, "in (0, 1)")
    records = found.num_records
    like, near = _like(found, epsilon)
    groups: dict[str, dict[str, Any]] = {
        "data": {
            "name": "folder",
            "path": str(path.resolve()),
            "image_size": found.side,
            "validation_size": found.num_validation,
        },
        "model": {
            "name": "scattering_linear",
            "scales": int(math.log2(found.side // 8)),  # coefficients on an 8x8 grid
            "angles": 8,
            "roots": True,
            "groups": 27,
            "epsilon": 1e-2,
        },
        "finetune": {"embeddings": "kept"},
        "method": {"name": "dp_sgd"},
        "privacy": {
            "epsilon": epsilon,
            "delta": delta or min(1e-5, 10.0 ** math.floor(-math.log10(10 * records))),
            "expected_batch_size": max(round(like.sampling_prob * records), 1),
            "num_updates": like.num_updates,
            "l2_clip_norm": 0.1,
            "uncovered": "image size, scales, batch, updates, learning rate and delta,"
            " by the number of images and their median size",
        },
        "optimizer": {
            "learning_rate": like.learning_rates[near],
            "momentum": 0.9,
            "ema_decay": 0.95,
        },
        "logging": {"log_every": 10, "eval_every": 50, "checkpoint_every": 50},
    }
    lines = [f'"""Images of {found.num_classes} classes at epsilon {epsilon:g}.']
    lines += ["", *textwrap.wrap(expect(found, epsilon), 88), '"""', ""]
    lines += ["from configs._base import experiment", "", "", "def get_config():"]
    lines += ["    return experiment("]
    for name, values in groups.items():
        lines.append(f"        {name}={{")
        lines += [f"            {_text(k)}: {_text(v)}," for k, v in values.items()]
        lines.append("        },")
    return "\n".join([*lines, "    )", ""])


def expect(found: Found, epsilon: float) -> str:
    """Says what accuracy so many images and such an epsilon may give."""
    like, near = _like(found, epsilon)
    return (
        f"{found.num_records:,} training records and {found.num_validation:,} for"
        f" validation. On {like.num_records:,} images of Fashion-MNIST, of ten classes,"
        f" such a classifier came to {like.accuracies[near]:.0f} % at epsilon {near:g},"
        f" and to {like.without_noise:.0f} % without noise. Photographs are harder."
        " Noise costs the less the more records there are; with fewer than some"
        " thousand, a head on an encoder that was trained on public images does better:"
        " docs/fine_tuning.md."
    )


def _like(found: Found, epsilon: float) -> tuple[Measured, float]:
    """Returns what was measured of the nearest number of records, and its epsilon."""

    def away(measured: float, value: float) -> float:
        return abs(math.log(measured / value))

    like = min(_MEASURED, key=lambda m: away(m.num_records, found.num_records))
    return like, min(like.accuracies, key=lambda e: away(e, epsilon))


def _text(value: object) -> str:
    """Writes a value as Python, in ASCII, text in double quotes if it has none."""
    text = ascii(value)
    return text if not isinstance(value, str) or '"' in value else f'"{text[1:-1]}"'
