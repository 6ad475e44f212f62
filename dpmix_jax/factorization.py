"""Noise that is correlated between updates, so that part of it cancels: DP-BandMF.

Weights after t updates depend on the sum of t gradients, so noise that takes back some
of what it added before disturbs them less. A strategy c = (c_0, ..., c_(b-1)) says how:
with independent noise z, the noise w of update t is found from

    c_0 w_t + c_1 w_(t-1) + ... + c_(b-1) w_(t-b+1) = z_t,

so what is released tells no more than the c-weighted sums of b updates with noise z.
A record that is in at most one of any b updates moves these by the norm of c times the
clip norm, once for each time it is drawn. So the records are divided at random into b
parts, which take turns, and from the part whose turn it is a batch is drawn with b
times the probability (Choquette-Choo et al., 2023, "(Amplified) banded matrix
factorization", Theorem 4; the strategies are Toeplitz matrices, McKenna, 2024).
"""

import math

import jax
import numpy as np
from jax_privacy.matrix_factorization import toeplitz
from scipy import signal

from dpmix_jax.errors import require

Strategy = tuple[float, ...]
INDEPENDENT: Strategy = (1.0,)


def strategy(num_updates: int, bands: int) -> Strategy:
    """Returns the strategy of b bands that disturbs the sums of gradients least.

    It has the least mean squared error over the sums after 1, ..., T updates, by
    jax_privacy's optimizer. It depends on these two numbers alone, on no data.

    Args:
      num_updates: T.
      bands: b, in [1, T]; 1 is independent noise.

    Returns:
      b coefficients of L2 norm 1.

    Raises:
      UserError: for another number of bands.
    """
    require(1 <= bands <= num_updates, "bands", bands, f"in [1, {num_updates}]")
    if bands == 1:
        return INDEPENDENT
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = np.asarray(toeplitz.optimize_banded_toeplitz(num_updates, bands))
    return tuple(float(c) for c in found / np.linalg.norm(found))


def error(strategy: Strategy, num_updates: int) -> float:
    """Returns the root mean squared error of the sums after 1, ..., T updates.

    Args:
      strategy: c, of any norm; z has the norm of c for its standard deviation.
      num_updates: T.
    """
    noise = math.hypot(*strategy) * np.cumsum(impulse(strategy, num_updates))
    return float(np.sqrt(np.mean(np.cumsum(noise**2))))


def impulse(strategy: Strategy, length: int) -> np.ndarray:
    """Returns what one number of z adds to the noise w of this and later updates.

    Args:
      strategy: c.
      length: number of updates.

    Returns:
      float64 [length], the first column of the inverse of the matrix of c.
    """
    first = np.eye(1, length)[0]
    return signal.lfilter([1.0], strategy, first) if length else first
