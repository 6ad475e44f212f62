"""ZCA whitening: embeddings in the axes and scales of those of public images.

Noise is as large in every direction, while embeddings vary in few. A linear classifier
of whitened embeddings therefore learns under the same noise what it would otherwise
learn in many more updates.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dpmix_jax.errors import UserError

PyTree = Any

_MOST_IMAGES, _LARGEST, _RANK = 2048, 2**17, 256  # which bound time and memory


class Whitening(nn.Module):
    """Takes a mean out of embeddings, and scales some of their directions.

    Parameters are the `mean` [E], orthonormal `directions` [E, R] with their `gains`
    [R], and one `scale` [1]. With x' = x - mean, x becomes
    scale (x' + directions (gains * directions^T x')). The parameters start as the
    identity, come from `fit`, and are never trained.
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
        scale = self.param("scale", nn.initializers.ones, (1,))
        flat = flat - mean[None]
        product = functools.partial(jnp.matmul, precision="highest")
        along = product(flat, directions) * gains[None]
        return (scale[None] * (flat + product(along, directions.T))).reshape(x.shape)


def chosen(count: int) -> np.ndarray:
    """Returns which of so many public images are embedded: all, or 2,048 of them."""
    return np.linspace(0, count - 1, min(count, _MOST_IMAGES)).astype(int)


def fit(embeddings: np.ndarray, regularization: float) -> PyTree:
    """Returns parameters with which `Whitening` whitens embeddings like these.

    Directions are eigenvectors of the covariance, and an eigenvalue a is scaled by
    sqrt(r / (a + r)), r `regularization` times the greatest (Krizhevsky, 2009; Coates
    and Ng, 2012). All but the first 256 are left as they are. The scale then gives
    these embeddings the mean squared norm that they had.

    Args:
      embeddings: [n, ...], of public images; where they hardly vary, nothing but their
        mean is taken out.
      regularization: at least 1e-4, for which float32 is enough.

    Raises:
      UserError: for embeddings that are not finite, or of more than 131,072 numbers.
    """
    flat = embeddings.reshape(len(embeddings), -1)
    size = flat.shape[1]
    if size > _LARGEST:
        raise UserError(
            f"finetune.whitening is {regularization}: it must be None for embeddings of"
            f" {size:,} numbers, more than {_LARGEST:,}"
        )
    if not np.isfinite(flat).all():
        raise UserError(
            f"finetune.whitening is {regularization}: it must be None for an encoder"
            " whose embeddings of public images are not finite"
        )
    flat = flat.astype(np.float64)
    before, mean, rank = np.square(flat).sum(), flat.mean(0), min(_RANK, size)
    flat -= mean
    after = np.square(flat).sum()
    directions, gains, scale = np.zeros((size, rank)), np.zeros(rank), np.ones(1)
    if after > 1e-10 * before:
        values, axes = _principal_axes(flat, rank)
        ratios = regularization / (values / values[0] + regularization)
        directions[:, : len(axes)] = axes.T
        gains[: len(axes)] = np.sqrt(ratios) - 1
        scale *= np.sqrt(before / (after - (values * (1 - ratios)).sum()))
    found = dict(mean=mean, directions=directions, gains=gains, scale=scale)
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


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
