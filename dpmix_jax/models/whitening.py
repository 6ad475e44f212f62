"""PCA whitening: embeddings in the axes and scales of those of public images.

Noise is as large in every direction, while embeddings vary in few. A linear classifier
of whitened embeddings therefore learns under the same noise what it would otherwise
learn in many more updates, and from fewer numbers of each record.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dpmix_jax.errors import require

PyTree = Any

_MOST_IMAGES, _LARGEST, _AXES = 4096, 2**17, 1024  # which bound time and memory


class Whitening(nn.Module):
    """Takes a mean out of embeddings, and puts the rest into a few scaled axes.

    Parameters are the `mean` [E] and `axes` [E, A], A at most 1,024. They come from
    `fit` and are never trained.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Embeddings [B, ...] -> embeddings [B, A], each of its own alone."""
        flat = x.reshape(x.shape[0], -1)
        size = flat.shape[1]
        mean = self.param("mean", nn.initializers.zeros, (size,))
        axes = self.param("axes", nn.initializers.zeros, (size, min(_AXES, size)))
        return jnp.matmul(flat - mean[None], axes, precision="highest")


def chosen(count: int) -> np.ndarray:
    """Returns which of so many public images are embedded: all, or 4,096 of them."""
    return np.linspace(0, count - 1, min(count, _MOST_IMAGES)).astype(int)


def fit(embeddings: np.ndarray, regularization: float) -> PyTree:
    """Returns parameters with which `Whitening` whitens embeddings like these.

    Axes are the first eigenvectors of the covariance, and that of the eigenvalue a is
    divided by sqrt(a + r), r `regularization` times the greatest (Krizhevsky, 2009;
    Coates and Ng, 2012). All are then scaled as one, so that these embeddings keep
    their mean squared norm.

    Args:
      embeddings: [n, ...], of public images.
      regularization: at least 1e-4, for which float32 is enough.

    Raises:
      UserError: for embeddings that are not finite, hardly differ, or have more than
        131,072 numbers.
    """
    flat = embeddings.reshape(len(embeddings), -1)
    size = flat.shape[1]
    for fine, what in (
        (size <= _LARGEST, f"embeddings of {size:,} numbers, more than {_LARGEST:,}"),
        (np.isfinite(flat).all(), "embeddings of public images that are not finite"),
    ):
        require(fine, "finetune.whitening", regularization, f"None for {what}")
    flat = flat.astype(np.float64)
    before, mean = np.vdot(flat, flat), flat.mean(0)
    flat -= mean
    require(
        np.vdot(flat, flat) > 1e-10 * before,
        "finetune.whitening",
        regularization,
        "None for embeddings of public images that hardly differ",
    )
    values, found = _principal_axes(flat, min(_AXES, size))
    scales = 1 / np.sqrt(values / values[0] + regularization)
    scales *= np.sqrt(before / np.square(scales).dot(values))
    axes = np.zeros((size, min(_AXES, size)))
    axes[:, : len(found)] = found.T * scales
    return {"mean": mean.astype(np.float32), "axes": axes.astype(np.float32)}


def _principal_axes(centred: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns sums of squares along principal axes, and these [r, E], of rows [n, E].

    They come from the smaller of the two products of the rows with themselves, which
    takes a tenth of the time of a singular value decomposition.
    """
    few = len(centred) < centred.shape[1]
    products = centred @ centred.T if few else centred.T @ centred
    values, vectors = np.linalg.eigh(products)
    values, vectors = values[::-1][:most], vectors[:, ::-1][:, :most]
    vary = values > 1e-12 * values[0]
    values, vectors = values[vary], vectors[:, vary]
    axes = vectors.T @ centred / np.sqrt(values)[:, None] if few else vectors.T
    return values, axes
