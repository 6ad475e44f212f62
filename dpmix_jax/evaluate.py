"""Evaluation of classifiers on whole datasets."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpmix_jax.data import Records

PyTree = Any


def make_confusion(
    logits_fn: Callable[[PyTree, jax.Array], jax.Array],
    records: Records,
    *,
    batch_size: int = 512,
) -> Callable[[PyTree], np.ndarray]:
    """Compiles the evaluation of a model on every record of a dataset.

    Args:
      logits_fn: `f(params, images [B, H, W, C]) -> logits [B, O]`.
      records: M of them; the last partial batch counts too.
      batch_size: images in one call.

    Returns:
      `f(params) -> [O, O]` int64 counts, true classes along rows, predicted ones along
      columns.
    """
    num_classes = records.num_classes
    batch_size = min(batch_size, max(len(records), 1))

    @jax.jit
    def predict(params, images):
        return jnp.argmax(logits_fn(params, records.normalize(images)), axis=-1)

    def confusion(params: PyTree) -> np.ndarray:
        counts = np.zeros((num_classes, num_classes), np.int64)
        for start in range(0, len(records), batch_size):
            images = records.images[start : start + batch_size]
            labels = records.labels[start : start + batch_size]
            padding = [(0, batch_size - len(images))] + [(0, 0)] * (images.ndim - 1)
            predicted = np.asarray(predict(params, np.pad(images, padding)))
            np.add.at(counts, (labels, predicted[: len(labels)]), 1)
        return counts

    return confusion


def accuracy(confusion: np.ndarray) -> float:
    """Returns the fraction of records on the diagonal of a confusion matrix [O, O]."""
    return float(np.trace(confusion) / max(confusion.sum(), 1))


def per_class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Returns the fraction of each true class that is recognised, [O]."""
    return np.diag(confusion) / np.maximum(confusion.sum(axis=1), 1)
