"""Private least squares on frozen features: one noisy query, no training.

A linear model of one-hot labels is a function of two sums over records, A = sum x x^T
and b = sum x y^T (Vu and Slavkovic, 2009). Noise on both is all that privacy costs:
what is solved of them, and how, is post-processing. Mehta et al. (2023,
https://arxiv.org/abs/2211.13403) find that on the features of a pretrained encoder it
is better than logistic regression, above all at small epsilon.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy import clipping

from dpmix_jax import accounting, gradients, privacy
from dpmix_jax.errors import require


class Moments(NamedTuple):
    """Sums over records, of features x / C and labels y of norm 1 at most.

    Attributes:
      second: [d (d + 1) / 2], the upper triangle of sum x x^T / C^2, row by row; what
        is off the diagonal times sqrt(2), for the whole matrix has it twice: the norm
        of this vector is the Frobenius norm of the matrix.
      cross: [d, O], sum x y^T / C.
    """

    second: jax.Array
    cross: jax.Array


def clipped_moments(
    l2_clip_norm: float, num_records: int
) -> clipping.BoundedSensitivityCallable:
    """Returns the sum of the moments of records.

    Formal guarantees:
      - A record's term has L2 norm at most sqrt(2), for second and cross moments have
        1 each (up to float32 rounding of the term). The sum is formed in float64, and
        what its one rounding to float32 may add to the distance of two sums is part of
        the sensitivity. So adding or removing a record moves the sum by at most
        `.sensitivity(ADD_OR_REMOVE_ONE)`, and replacing one by at most
        `.sensitivity(REPLACE_ONE)`, twice as much.
      - This holds for records that are NaN, infinite or huge: numbers that are not
        finite count as 0.
      - Padding contributes exactly 0.

    Args:
      l2_clip_norm: C, in [1e-10, 1e10]; features of a larger norm are scaled down to
        it, each record's by themselves.
      num_records: N, the most records of a sum.

    Returns:
      `f(features [N, d], labels [N, O], is_padding_example=None) -> Moments`. Labels
      are one-hot or soft; those of a norm above 1 are scaled down to it. There is no
      intercept: whoever wants one appends a constant to the features.

    Raises:
      UserError: if `l2_clip_norm` is out of that range; by `f`, for labels of another
        shape, or more than N records.
    """
    gradients.check_clip_norm(l2_clip_norm)

    def moments(features, labels, is_padding_example=None):
        allowed = f"[{features.shape[0]}, O], one-hot or soft"
        fits = labels.ndim == 2 and len(labels) == len(features)
        require(fits, "the shape of labels", labels.shape, allowed)
        x, y = _clipped(features, l2_clip_norm), _clipped(labels, 1.0)
        if is_padding_example is not None:
            x = jnp.where(is_padding_example[:, None], 0, x)
        require(len(x) <= num_records, "records", len(x), f"at most {num_records}")
        with jax.enable_x64(True):
            x, y = x.astype(jnp.float64), y.astype(jnp.float64)
            found = Moments(_packed(x.T @ x), x.T @ y)
            return jax.tree.map(lambda sums: sums.astype(jnp.float32), found)

    # A sum is at most sqrt(2) N long, and is rounded by a share of 2^-24 of that.
    rounded = 2 * 2.0**-24 * (num_records + 1)
    return clipping.BoundedSensitivityCallable(
        moments, math.sqrt(2) * (1 + rounded), has_aux=False
    )


def _clipped(rows: jax.Array, l2_clip_norm: float) -> jax.Array:
    """Scales rows to norm C at most, and divides by C."""
    rows = jnp.asarray(rows, jnp.float32)
    rows = jnp.where(jnp.isfinite(rows), rows, 0)
    # By the largest first, whose square may be no float.
    largest = jnp.abs(rows).max(axis=1, keepdims=True)
    rows = rows / jnp.maximum(largest, l2_clip_norm)
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1)


def _packed(matrix: jax.Array) -> jax.Array:
    """[d, d], symmetric -> [d (d + 1) / 2], of the same norm."""
    rows, columns = np.triu_indices(len(matrix))
    return matrix[rows, columns] * np.where(rows == columns, 1, 2**0.5)


def _unpacked(packed: np.ndarray) -> np.ndarray:
    """The inverse of `_packed`, in float64."""
    size = (math.isqrt(8 * len(packed) + 1) - 1) // 2
    rows, columns = np.triu_indices(size)
    matrix = np.zeros((size, size))
    matrix[rows, columns] = packed / np.where(rows == columns, 1, 2**0.5)
    return matrix + np.triu(matrix, 1).T


def private_moments(
    features: jax.Array,
    labels: jax.Array,
    *,
    l2_clip_norm: float,
    mechanism: accounting.Mechanism,
    key: jax.Array,
) -> tuple[Moments, float]:
    """Returns the moments of all records with noise, and its standard deviation.

    The noise multiplier m is in units of the sensitivity of both moments together. That
    is the composition of two queries of multiplier sqrt(2) m, one of each moment, and
    as tight: all are Gaussian mechanisms of mu = 1 / m (Dong et al., 2022).

    Formal guarantees:
      - Independent Gaussian noise of one standard deviation, `noise_multiplier` times
        `clipped_moments(...).sensitivity(neighboring_relation)`, is on every number of
        `Moments`; see `privacy.privatizer` for how it is drawn. Of sum x x^T the noise
        is therefore symmetric, and smaller by sqrt(2) off the diagonal than on it.

    Args:
      features: [N, d].
      labels: [N, O], see `clipped_moments`.
      l2_clip_norm: C.
      mechanism: from `accounting.calibrate`, with `sampling_prob` and `num_updates` 1.
      key: uint32 [8] from `noise_key`, secret, and for this one query.

    Raises:
      UserError: for a mechanism that is not one query of all records.
    """
    query = (mechanism.sampling_prob, mechanism.num_updates)
    allowed = "(1.0, 1), one query of all records"
    require(query == (1, 1), "(sampling_prob, num_updates)", query, allowed)
    moments_fn = clipped_moments(l2_clip_norm, len(features))
    privatizer = privacy.privatizer(
        moments_fn, mechanism, expected_batch_size=1.0, key=key
    )
    sensitivity = moments_fn.sensitivity(mechanism.neighboring_relation)
    moments = jax.jit(moments_fn)(jnp.asarray(features), jnp.asarray(labels))
    noisy, _ = privatizer.update(moments, privatizer.init(None))
    return noisy, mechanism.noise_multiplier * sensitivity


def solve(moments: Moments, stddev: float) -> np.ndarray:
    """Returns the weights [d, O] of x / C that fit y best, given moments with noise.

    That is (A + ridge I)^-1 b, with negative eigenvalues of A set to 0: without noise
    it has none. The ridge is the largest eigenvalue that noise alone has, sqrt(2 d)
    times its standard deviation: a symmetric matrix of deviation s off the diagonal
    has eigenvalues up to 2 s sqrt(d) (Wigner, 1958). So directions in which features
    vary less than the noise does are damped, and no record has a say in the choice.
    """
    values, axes = np.linalg.eigh(_unpacked(np.asarray(moments.second, np.float64)))
    ridge = stddev * math.sqrt(2 * len(values))
    cross = np.asarray(moments.cross, np.float64)
    return axes @ ((axes.T @ cross) / (np.maximum(values, 0) + ridge)[:, None])


def fit(
    features: jax.Array,
    labels: jax.Array,
    *,
    l2_clip_norm: float,
    mechanism: accounting.Mechanism,
    key: jax.Array,
) -> np.ndarray:
    """Fits a private linear classifier of features.

    Formal guarantees:
      - The weights are a function of `private_moments` and of nothing else that the
        records have a part in.

    Args:
      features: [N, d], made of each record alone, by an encoder that is public.
      labels: [N, O], one-hot.
      l2_clip_norm: C. The noise is in proportion to it: features that all have this
        norm lose nothing by the clip, and stand out best.
      mechanism: as for `private_moments`.
      key: uint32 [8] from `noise_key`, secret, and for this one fit.

    Returns:
      Weights float32 [d, O]: the class of features x is that of the largest of x @
      weights.

    Raises:
      UserError: see `private_moments`.
    """
    moments, stddev = private_moments(
        features, labels, l2_clip_norm=l2_clip_norm, mechanism=mechanism, key=key
    )
    return (solve(moments, stddev) / l2_clip_norm).astype(np.float32)
