"""The epsilon of random allocation (balls in bins), see `sampling.allocated_batch`.

An epoch is t batches, and each record is in one of them, which it draws for itself in
each epoch. Chua et al. (2024) and Feldman and Shenfeld (2025) show which pair of
distributions bounds an epoch; the accountant is that of Feldman and Shenfeld (2026,
arXiv 2602.17284), pld-accounting, an optional dependency: `pip install
"dpmix_jax[allocation]"`.
"""

import functools
import math
import types
import warnings

import dp_accounting
import scipy.optimize

from dpmix_jax.errors import needing, require

# Of the accountant. Rounding, always upward, costs about a tenth of `_ROUNDING` of
# epsilon; the time of a query is inverse to it.
_ROUNDING = 0.02
_SUM_POINTS = 300_000  # at most, of each term of the sum over an epoch's batches
_LOSS_POINTS_OF_TERMS = 5_000  # the same, on equal steps of the loss
_LOSS_POINTS = 100  # in one standard deviation of the privacy loss of an epoch
_TAILS = 0.01  # of delta, cut off in all
_MIN_NOISE = 0.2  # below, no amplification is counted; floats would overflow further on


def batches_per_epoch(sampling_prob: float) -> int:
    """Returns t = 1 / q, or raises `UserError` if that is no whole number."""
    batches = round(1 / sampling_prob) if 0 < sampling_prob <= 1 else 0
    whole = abs(batches * sampling_prob - 1) < 1e-9
    allowed = "one over a whole number for random allocation"
    require(whole, "sampling_prob", sampling_prob, allowed)
    return batches


def epsilon(
    noise_multiplier: float, *, num_updates: int, batches_per_epoch: int, delta: float
) -> float:
    """Returns the epsilon of T updates whose batches are allocated at random.

    Formal guarantees:
      - No less than the epsilon of these updates for training sets of which one has one
        record more (`ADD_OR_REMOVE_ONE`), each update releasing the sum over its batch
        with Gaussian noise; all that is rounded or cut off is so upward. The epsilon of
        a last epoch that is not complete is that of the whole epoch, whose first
        updates these are.
      - No more than the epsilon of the same updates without amplification, when it is
        known which batches each record is in.

    It is 0.1 to 0.4 % above where t is 4 to 30, and 3 % at t = 100 with sigma below 1
    (`tests/test_allocation.py`); a query takes one to eight seconds.

    Args:
      noise_multiplier: sigma, standard deviation of the noise on a sum over C.
      num_updates: T, at least 0.
      batches_per_epoch: t.
      delta: in [1e-10, 1).

    Raises:
      UserError: for an argument out of its range, or without pld-accounting.

    Example:
      >>> from dpmix_jax import allocation
      >>> updates = {"num_updates": 280, "batches_per_epoch": 7}
      >>> f"{allocation.epsilon(4.0, delta=1e-5, **updates):.2f}"
      '2.48'
    """
    sigma = float(noise_multiplier)
    require(0 < sigma < math.inf, "noise_multiplier", sigma, "positive and finite")
    require(num_updates >= 0, "num_updates", num_updates, "at least 0")
    ok = batches_per_epoch >= 1
    require(ok, "batches_per_epoch", batches_per_epoch, "at least 1")
    require(1e-10 <= delta < 1, "delta", delta, "in [1e-10, 1)")
    epochs = -(-num_updates // batches_per_epoch)
    if epochs == 0:
        return 0.0
    return _epsilon(sigma, int(epochs), int(batches_per_epoch), float(delta))


@functools.lru_cache(maxsize=1024)
def _epsilon(sigma: float, epochs: int, batches: int, delta: float) -> float:
    plain = dp_accounting.get_epsilon_gaussian(sigma / math.sqrt(epochs), delta)
    if batches == 1 or plain == 0 or sigma < _MIN_NOISE:
        return float(plain)
    library = _library()
    # The loss of an epoch spreads about so much, that of all about sqrt(epochs) times.
    spread = min(math.sqrt(math.expm1(min(1 / sigma**2, 700)) / batches), 1 / sigma)
    tail = _TAILS * delta / (2 * epochs)
    config = _discretization(library, sigma, epochs, batches, spread, tail)

    def loss(direction):
        """Returns the loss of an epoch, on coarser points by connecting the dots."""
        fine = library.gaussian_allocation_directional_pld(
            params=library.PrivacyParams(sigma=sigma, num_steps=batches),
            config=config,
            direction=direction,
            bound_type=library.BoundType.DOMINATES,
        )
        return library.rediscretize_dist_by_bound(
            dist=fine,
            tail_truncation=tail,
            loss_discretization=spread / _LOSS_POINTS,
            bound_type=library.BoundType.DOMINATES,
        )

    epoch = library.compose_full_pld(
        remove_dist=loss(library.Direction.REMOVE),
        add_dist=loss(library.Direction.ADD),
        bound_type=library.BoundType.DOMINATES,
    )
    amplified = epoch.self_compose(epochs).get_epsilon_for_delta(delta)
    return float(min(plain, amplified))


def _discretization(library, sigma, epochs, batches, spread, tail):
    """Returns how an epoch's sum of t terms exp(loss) is computed, and how finely.

    On equal steps, by FFT; or, where little noise spreads the terms too far for that,
    on equal steps of the loss, which is slow and hence coarse.
    """
    finest = _ROUNDING * spread / math.sqrt(epochs)  # upward, of the loss of an epoch
    largest = math.exp(7 / sigma + 0.5 / sigma**2) / batches
    stages = 2 + 2 * math.log2(batches)
    if batches * largest / _SUM_POINTS <= max(
        finest, stages * 14 / sigma / _LOSS_POINTS_OF_TERMS
    ):
        return library.AllocationSchemeConfig(
            loss_discretization=finest / (batches + 1),
            tail_truncation=tail,
            max_grid_fft=_SUM_POINTS * batches,
            convolution_method=library.ConvolutionMethod.FFT,
        )
    return library.AllocationSchemeConfig(
        loss_discretization=finest,
        tail_truncation=tail,
        max_grid_mult=_LOSS_POINTS_OF_TERMS,
        convolution_method=library.ConvolutionMethod.GEOM,
    )


def calibrate(
    *, epsilon: float, delta: float, num_updates: int, batches_per_epoch: int
) -> float:
    """Finds the least noise with which T updates stay within (epsilon, delta).

    Formal guarantees:
      - The `epsilon` function's value at the returned noise is at most `epsilon`.

    Args:
      epsilon: the budget, positive.
      delta: in [1e-10, 1).
      num_updates: T, at least 1.
      batches_per_epoch: t.

    Returns:
      The noise multiplier sigma, at most 1e-4 of it more than the least.

    Raises:
      UserError: as `epsilon` does.
    """
    require(0 < epsilon < math.inf, "epsilon", epsilon, "positive and finite")
    require(num_updates >= 1, "num_updates", num_updates, "at least 1")
    spent = functools.partial(
        _spent,
        num_updates=num_updates,
        batches_per_epoch=batches_per_epoch,
        delta=delta,
    )
    # By the central limit, all updates are about one Gaussian mechanism.
    unit = dp_accounting.get_sigma_gaussian(epsilon, delta)
    epochs = -(-num_updates // batches_per_epoch)
    guess = math.log1p(batches_per_epoch / epochs / unit**2) ** -0.5
    low = high = guess
    while spent(high) > epsilon:
        low, high = high, 1.1 * high
    while spent(low) <= epsilon:
        low, high = low / 1.1, low
    # Epsilon is nearly a power of sigma, so in logarithms few queries find it.
    exponent = scipy.optimize.brentq(
        lambda exponent: math.log(max(spent(math.exp(exponent)), 1e-300) / epsilon),
        math.log(low),
        math.log(high),
        xtol=2e-5,
    )
    noise_multiplier = math.exp(exponent)
    while spent(noise_multiplier) > epsilon:
        noise_multiplier *= 1 + 3e-5
    return noise_multiplier


def _spent(noise_multiplier: float, **updates) -> float:
    # Not a second name of `epsilon`, whose guarantees would be claimed twice.
    return epsilon(noise_multiplier, **updates)


def _library() -> types.ModuleType:
    with needing("allocation", "random allocation needs"), warnings.catch_warnings():
        # Numba, which it can do without, is missing.
        warnings.simplefilter("ignore", ImportWarning)
        import PLD_accounting
    return PLD_accounting
