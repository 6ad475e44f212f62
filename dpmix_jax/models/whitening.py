"""ZCA whitening: embeddings in the axes and scales of those of public images.

Noise is as large in every direction, while embeddings vary in few. A linear classifier
of whitened embeddings therefore learns under the same noise what it would otherwise
learn in many more updates.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

PyTree = Any

MOST_IMAGES = 2048  # whose embeddings are taken, which bounds the time that it takes
_RANK = 256


class Whitening(nn.Module):
    """Takes a mean out of embeddings, and scales some of their directions.

    Parameters are the `mean` [E], orthonormal `directions` [E, R] with their `gains`
    [R], and one `scale`: x -> scale (x' + directions (gains * directions^T x')) with
    x' = x - mean. They start as the identity, see `fit`, and are never trained.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Embeddings [B, ...] -> embeddings [B, ...], each of its own alone."""
        flat = x.reshape(x.shape[0], -1)
        size = flat.shape[1]
        rank = min(_RANK, size)
        mean = self.param("mean", nn.initializers.zeros, (size,))
        directions = self.param("directions", nn.initializers.zeros, (size, rank))
        gains = self.param("gains", nn.initializers.zeros, (rank,))
        scale = self.param("scale", nn.initializers.ones, ())
        flat = flat - mean[None]
        along = (flat @ directions) * gains[None]
        return (scale * (flat + along @ directions.T)).reshape(x.shape)


def fit(embeddings: np.ndarray, regularization: float) -> PyTree:
    """Returns the parameters of `Whitening` of which it whitens some embeddings.

    Directions are eigenvectors of the covariance, and an eigenvalue a is scaled by
    sqrt(r / (a + r)), r `regularization` times the greatest (Krizhevsky, 2009; Coates
    and Ng, 2012). All but the first 256 are left as they are, for which a is far below
    r. The scale then gives embeddings the mean squared norm that they had.

    Args:
      embeddings: [n, ...], of public images.
      regularization: positive.
    """
    flat = embeddings.reshape(len(embeddings), -1).astype(np.float64)
    mean, size = flat.mean(0), flat.shape[1]
    centred = flat - mean
    variances, axes = _principal_axes(centred, min(_RANK, size))
    directions, gains = np.zeros((size, min(_RANK, size))), np.zeros(min(_RANK, size))
    directions[:, : len(axes)] = axes.T
    gains[: len(axes)] = np.sqrt(regularization / (variances + regularization)) - 1
    white = centred + (centred @ directions) * gains @ directions.T
    norm, before = np.square(white).sum(), np.square(flat).sum()
    scale = np.sqrt(before / norm) if norm > 0 else 1.0
    found = dict(mean=mean, directions=directions, gains=gains, scale=scale)
    return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}


def _principal_axes(centred: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns variances, the greatest 1, and their axes [r, E] of rows [n, E].

    They come from the smaller of the two products of the rows with themselves, which
    takes a tenth of the time of a singular value decomposition.
    """
    few = len(centred) < centred.shape[1]
    products = centred @ centred.T if few else centred.T @ centred
    values, vectors = np.linalg.eigh(products)
    values, vectors = values[::-1][:most], vectors[:, ::-1][:, :most]
    vary = values > 1e-12 * max(values[0], 0.0)
    values, vectors = values[vary], vectors[:, vary]
    axes = vectors.T @ centred / np.sqrt(values)[:, None] if few else vectors.T
    return values / values[:1], axes
