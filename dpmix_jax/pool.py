"""Public images of which every augmentation set may draw a few.

Everything in a pool is public: it may come from a generative model or another dataset,
never from the private records or from what was computed from them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpmix_jax.errors import UserError, require_one_of

Array = jax.Array | np.ndarray
DRAWS = ("uniform", "class")


class Pool(NamedTuple):
    """Public labelled images: an argument of compiled functions, never a constant.

    Attributes:
      images: [M, H, W, C], uint8 or floating-point.
      labels: int32 [M] in [0, O).
      by_class: int32 [M], the rows of `images`, those of class 0 first.
      ends: int32 [O + 1]: the rows of class c are `by_class[ends[c] : ends[c + 1]]`.
    """

    images: Array
    labels: Array
    by_class: Array
    ends: Array


def make_pool(
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    draw: str = "uniform",
) -> Pool:
    """Makes a pool of public images, with the tables that draws by class look up.

    Args:
      images: [M, H, W, C].
      labels: integers [M] in [0, O).
      class_names: O names, in the order of the private labels.
      draw: how it will be drawn from, one of `DRAWS`.

    Raises:
      UserError: if the pool is empty, if shapes, labels or `draw` are not as stated, or
        if `draw` is "class" and a class has no image.
    """
    require_one_of("draw", draw, DRAWS)
    labels, num_classes = np.asarray(labels), len(class_names)
    if images.ndim != 4 or labels.shape != images.shape[:1] or not labels.size:
        raise UserError(
            f"public images have shape {images.shape}, their labels {labels.shape}:"
            " they must be [M, H, W, C] and [M], M at least 1"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"public labels are {labels.dtype}: they must be integers")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(
            f"public labels are in [{labels.min()}, {labels.max()}]: they must be in"
            f" [0, {num_classes})"
        )
    counts = np.bincount(labels, minlength=num_classes)
    if draw == "class" and not counts.all():
        raise UserError(
            "method.draw is 'class': every class must have a public image, but"
            f" {class_names[int(np.argmin(counts))]!r} has none"
        )
    return Pool(
        images=images,
        labels=labels.astype(np.int32),
        by_class=np.argsort(labels, kind="stable").astype(np.int32),
        ends=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
    )


def draw_rows(
    key: jax.Array, label: jax.Array, pool: Pool, num: int, *, draw: str
) -> jax.Array:
    """Draws rows of a pool for one record.

    Drawing by class reads a private label, but costs no privacy: the drawn images go
    into this record's own set and nowhere else. The record's term is the average
    gradient over that set, clipped, so its norm is at most C whatever the label is. It
    would not be safe to let the label choose anything outside that term, such as images
    that records share, the number of such images, or what is logged.

    Formal guarantees:
      - The rows are a function of this key, this label and the pool, and for "uniform"
        not of the label.
      - Each row is uniform over the pool, or for "class" over its images of the
        record's class, if it has any; rows are independent, so one may come twice.

    Args:
      key: scalar key.
      label: [O] soft label of the record; its class is the largest entry.
      pool: from `make_pool`.
      num: k, rows to draw.
      draw: one of `DRAWS`.

    Returns:
      int32 [k] with values in [0, M).
    """
    if draw == "uniform":
        return jax.random.randint(key, (num,), 0, pool.labels.shape[0])
    own = jnp.argmax(label)  # the argmax of NaN is still a class
    ends = jnp.asarray(pool.ends)
    first, end = jnp.take(ends, jnp.stack([own, own + 1]))
    # For a class without images, draw from the whole pool. (For draws by class,
    # `make_pool` refuses such a class.)
    is_there = first < end
    first, end = jnp.where(is_there, first, 0), jnp.where(is_there, end, ends[-1])
    places = jax.random.randint(key, (num,), first, end)
    return jnp.take(jnp.asarray(pool.by_class), places)
