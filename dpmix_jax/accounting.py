"""From a budget (epsilon, delta) to a noise multiplier and back.

The mechanism is T updates, each a Gaussian mechanism on a Poisson sample. Accounting is
dp_accounting's: privacy loss distributions (PLD) decide, Renyi DP (RDP) is shown beside
them; for private selection, which PLD cannot compose, RDP decides. Results are cached
on disk (`DPMIX_JAX_CACHE`, by default `~/.cache/dpmix_jax`).
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import inspect
import math
import numbers
import os
import pathlib
from collections.abc import Iterator

import absl.logging
import dp_accounting
import joblib
import scipy.optimize
from dp_accounting import NeighboringRelation, pld, rdp
from dp_accounting.pld import privacy_loss_distribution
from jax_privacy import clipping

from dpmix_jax import allocation, factorization
from dpmix_jax.errors import UserError, require, require_one_of
from dpmix_jax.files import cache_folder
from dpmix_jax.selection import Selection

RELATIONS = {relation.name.lower(): relation for relation in NeighboringRelation}
_ACCOUNTANTS = {"pld": pld.PLDAccountant, "rdp": rdp.RdpAccountant}
_MIN_NOISE, _MAX_NOISE = 2.0**-3, 2.0**14
_OWN_VERSION = 3  # of what is cached: raise it when `Mechanism` changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """T Poisson-subsampled Gaussian mechanisms: what the accountant sees of a run.

    With a strategy of b bands, the accountant sees T / b (rounded up) mechanisms for
    each record, each with b times the sampling probability: see `factorization`.

    Attributes:
      sampling_prob: q, the probability that a record is in a batch. With b bands it is
        b q in each update of the record's turn, and 0 in others.
      num_updates: T.
      noise_multiplier: standard deviation of the noise on the sum, divided by the sum's
        sensitivity under `neighboring_relation` (so by 2 C for `REPLACE_ONE`).
      neighboring_relation: which datasets count as neighbours.
      selection: the private selection in which each candidate does these T updates; or
        None.
      strategy: how noise is correlated between updates; by default it is not.
      allocated: whether batches are those of `sampling.allocated_batch`, 1 / q of them
        in an epoch, and not of Poisson samples.

    Raises:
      UserError: if q is outside [0, 1]; if T is not a whole number, at least 0; if the
        noise multiplier is not a finite number, at least 0; if a coefficient of the
        strategy is not finite, or the first is not positive; if b q is above 1; or if
        random allocation is combined with a relation other than `ADD_OR_REMOVE_ONE`, a
        selection, correlated noise, or a 1 / q that is not a whole number.

    Example:
      >>> mechanism = dpm.Mechanism(
      ...     sampling_prob=0.1, num_updates=1000, noise_multiplier=12.0
      ... )
      >>> f"{mechanism.epsilon(1e-5):.3f}"
      '0.988'
    """

    sampling_prob: float
    num_updates: int
    noise_multiplier: float
    neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE
    selection: Selection | None = None
    strategy: factorization.Strategy = factorization.INDEPENDENT
    allocated: bool = False

    def __post_init__(self):
        q, updates, noise = self.sampling_prob, self.num_updates, self.noise_multiplier
        require(0 <= q <= 1, "sampling_prob", q, "in [0, 1]")
        whole = isinstance(updates, numbers.Integral) and updates >= 0
        require(whole, "num_updates", updates, "a whole number, at least 0")
        require(0 <= noise < math.inf, "noise_multiplier", noise, "at least 0")
        if self.allocated:
            self._check_allocated()
        first = (*self.strategy, 0.0)[0]
        require(first > 0, "strategy[0]", first, "positive")
        finite = all(map(math.isfinite, self.strategy))
        require(finite, "strategy", self.strategy, "of finite numbers")
        most = f"at most 1 / sampling_prob = {1 / max(self.sampling_prob, 1e-9):.4g}"
        require(self.bands * self.sampling_prob <= 1, "bands", self.bands, most)

    def _check_allocated(self):
        with_allocation = "{} for random allocation".format
        relation, one = self.neighboring_relation, NeighboringRelation.ADD_OR_REMOVE_ONE
        allowed = with_allocation(one.name)
        require(relation == one, "neighboring_relation", relation.name, allowed)
        none = self.selection is None
        require(none, "selection", self.selection, with_allocation("None"))
        require(self.bands == 1, "bands", self.bands, with_allocation("1"))
        allocation.batches_per_epoch(self.sampling_prob)

    @property
    def batches_per_epoch(self) -> int:
        """Returns 1 / q, rounded: the batches of an epoch."""
        return round(1 / self.sampling_prob)

    @property
    def bands(self) -> int:
        """Returns b, the number of parts of the records that take turns."""
        return len(self.strategy)

    @property
    def num_turns(self) -> int:
        """Returns T / b, rounded up: the updates that a record can be in."""
        return -(-self.num_updates // self.bands)

    @property
    def accountant(self) -> str:
        """Returns the accountant that decides: `pld`, or `rdp` for a selection."""
        return "pld" if self.selection is None else "rdp"

    def noise_stddev(self, sensitivity: float) -> float:
        """Returns the standard deviation of the noise on a coordinate of a clipped sum.

        The value is that of the last update. Correlated noise is smaller in earlier
        updates.

        Args:
          sensitivity: of the sum under `neighboring_relation`.
        """
        # What remains of earlier updates adds to it, see `factorization.impulse`.
        remains = factorization.impulse(self.strategy, self.num_updates)
        of_strategy = math.hypot(*self.strategy) * math.hypot(*remains)
        return self.noise_multiplier * sensitivity * of_strategy

    def event(self) -> dp_accounting.DpEvent:
        """Returns the event to compose, whose noise is in units of the clip norm C.

        Raises:
          UserError: for random allocation, which is no event of dp_accounting.
        """
        require(not self.allocated, "allocated", True, "False: it has no event")
        # Our multiplier is in units of the sensitivity, C or 2 C for REPLACE_ONE;
        # dp_accounting's is in units of C, and it doubles by itself.
        unit = clipping.BoundedSensitivityCallable(lambda: None, 1.0, False)
        stddev = self.noise_multiplier * unit.sensitivity(self.neighboring_relation)
        updates = dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(
                self.bands * self.sampling_prob, dp_accounting.GaussianDpEvent(stddev)
            ),
            self.num_turns,
        )
        return updates if self.selection is None else self.selection.event(updates)

    def epsilon(self, delta: float, *, accountant: str | None = None) -> float:
        """Returns the epsilon of all T updates at this delta, for training records.

        The epsilon is that of exactly Gaussian noise. The privatizer's noise on a grid
        adds `noise.extra_delta` to delta.

        Args:
          delta: in (0, 1).
          accountant: `pld` (tight; infinite for a selection, which it cannot compose)
            or `rdp` (looser; infinite for `REPLACE_ONE`, which it cannot bound under
            Poisson sampling, and for random allocation). By default the one that
            decides.

        Raises:
          UserError: for an argument that is none of these.
        """
        require(0 < delta < 1, "delta", delta, "in (0, 1)")
        if self.num_updates == 0:
            return 0.0
        accountant, relation = accountant or self.accountant, self.neighboring_relation
        require_one_of("accountant", accountant, _ACCOUNTANTS)
        bounds_nothing = {
            "pld": self.selection is not None,
            "rdp": self.allocated or relation == NeighboringRelation.REPLACE_ONE,
        }
        if bounds_nothing[accountant]:
            return float("inf")
        if self.allocated:
            return allocation.epsilon(
                self.noise_multiplier,
                num_updates=self.num_updates,
                batches_per_epoch=self.batches_per_epoch,
                delta=delta,
            )
        with quiet():
            make = _ACCOUNTANTS[accountant]
            ledger = make(neighboring_relation=relation).compose(self.event())
            return float(ledger.get_epsilon(delta))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the RDP accountant's warning about each order that does not converge."""
    level = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(level)


@functools.cache
def _memory(folder: str) -> joblib.Memory:
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home costs seconds, not the run
        return joblib.Memory(None)
    return joblib.Memory(folder if os.access(folder, os.W_OK) else None, verbose=0)


def _cached(function, *args):
    """Calls a function through the disk cache of these versions of the code."""
    assert inspect.isfunction(function)  # by its source another process knows it
    try:
        version = accountant_version(allocated=True)
    except importlib.metadata.PackageNotFoundError:
        version = accountant_version()
    version = f"{version}-{_OWN_VERSION}".replace(" ", "-")
    return _memory(str(cache_folder() / version)).cache(function)(*args)


def accountant_version(*, allocated: bool = False) -> str:
    """Returns the accountant's name and version, for random allocation both."""
    packages = {"dp_accounting": "dp-accounting"}
    if allocated:
        packages["pld-accounting"] = "pld-accounting"
    versions = importlib.metadata.version
    return ", ".join(
        f"{name} {versions(package)}" for name, package in packages.items()
    )


def epsilon_after(mechanism: Mechanism, num_updates: int, delta: float) -> float:
    """Returns the epsilon of the first `num_updates` updates, cached on disk."""
    first = dataclasses.replace(mechanism, num_updates=num_updates)
    return _cached(_epsilon_of_first, first, delta)


def _epsilon_of_first(first: Mechanism, delta: float) -> float:
    """Returns what `Mechanism.epsilon` does, for several numbers of updates quicker.

    By PLD most of the time goes into the privacy loss of one update, found once here.
    """
    if not first.num_updates or first.allocated or first.accountant != "pld":
        return first.epsilon(delta)
    turns = first.event()
    loss = _loss_of_one(turns.event, first.neighboring_relation)
    return float(loss.self_compose(turns.count).get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=2)
def _loss_of_one(sampled, relation: NeighboringRelation):
    """Returns the privacy loss of a Poisson-sampled Gaussian event, as PLD finds it."""
    return privacy_loss_distribution.from_gaussian_mechanism(
        sampled.event.noise_multiplier,
        sampling_prob=sampled.sampling_probability,
        neighboring_relation=relation,
    )


def _calibrate(epsilon, delta, noiseless):
    updates = noiseless.num_updates
    if noiseless.allocated:
        return allocation.calibrate(
            epsilon=epsilon,
            delta=delta,
            num_updates=updates,
            batches_per_epoch=noiseless.batches_per_epoch,
        )

    @functools.cache  # the search asks again at the ends of its brackets
    def excess(noise_multiplier: float, accountant: str | None = None) -> float:
        each = dataclasses.replace(noiseless, noise_multiplier=noise_multiplier)
        return each.epsilon(delta, accountant=accountant) - epsilon

    # RDP is quick and bounds the search roughly; PLD, whose cost grows with epsilon, is
    # then asked only near the target.
    high = _MAX_NOISE
    while high > _MIN_NOISE and excess(high / 2, "rdp") <= 0:
        high /= 2
    enough = high > _MIN_NOISE
    while enough and high < _MAX_NOISE and excess(high) > 0:
        high *= 2
    low = high
    while enough and excess(low) <= 0:
        enough = low > _MIN_NOISE
        low, high = max(0.8 * low, _MIN_NOISE), low
    if not enough or low == high:
        raise UserError(
            f"no noise multiplier from {_MIN_NOISE:g} to {_MAX_NOISE:g} spends epsilon"
            f" {epsilon:g} at delta {delta:g} in {updates} updates with sampling"
            f" probability {noiseless.sampling_prob:.4g}: ask for another epsilon,"
            " batch size or number of updates"
        )
    tolerance = 1e-5 * low
    root = scipy.optimize.brentq(excess, low, high, xtol=tolerance)
    # The root is up to the tolerance off, on either side.
    return next(x for x in (root, root + tolerance, high) if excess(x) <= 0)


def calibrate(
    *,
    epsilon: float,
    delta: float,
    sampling_prob: float,
    num_updates: int,
    neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    selection: Selection | None = None,
    bands: int | None = 1,
    allocated: bool = False,
) -> Mechanism:
    """Finds the least noise with which T updates stay within (epsilon, delta).

    More bands correlate the noise of more updates, and need more noise. With `bands`
    None, larger and larger numbers of bands are tried, starting at 1, until the root
    mean squared error of the sums of gradients stops falling. That error is computed
    with the noise that RDP finds.

    Formal guarantees:
      - The epsilon of the returned mechanism, by the PLD accountant (for a selection by
        RDP) and computed anew whatever the cache says, is at most `epsilon`.

    Args:
      epsilon: the budget, positive.
      delta: in (0, 1).
      sampling_prob: q in (0, 1].
      num_updates: T, at least 1.
      neighboring_relation: which datasets count as neighbours.
      selection: of a private selection in which each candidate does these T updates.
      bands: b, at most 1 / q and T; 1 is independent noise, see `factorization`. For
        others batches must be drawn with as many, `sampling.batches(..., bands=b)`.
      allocated: whether batches are drawn by random allocation, as by
        `sampling.batches(..., allocated=True)`.

    Raises:
      UserError: for an argument out of its range, or if no noise multiplier in a sane
        range meets the budget.

    Example:
      >>> mechanism = dpm.calibrate(
      ...     epsilon=1.0, delta=1e-5, sampling_prob=0.1, num_updates=1000
      ... )
      >>> f"{mechanism.noise_multiplier:.2f}, {mechanism.epsilon(1e-5):.3f}"
      '11.87, 1.000'
    """
    for name, value, valid, allowed in (
        ("epsilon", epsilon, 0 < epsilon < math.inf, "positive and finite"),
        ("delta", delta, 0 < delta < 1, "in (0, 1)"),
        ("sampling_prob", sampling_prob, 0 < sampling_prob <= 1, "in (0, 1]"),
        ("num_updates", num_updates, num_updates >= 1, "at least 1"),
        ("num_updates", num_updates, num_updates % 1 == 0, "a whole number"),
        ("bands", bands, (bands or 1) % 1 == 0, "a whole number, or None"),
    ):
        require(valid, name, value, allowed)
    bounded = neighboring_relation != NeighboringRelation.REPLACE_ONE
    allowed = "None for REPLACE_ONE, for which nothing bounds it"
    require(selection is None or bounded, "selection", selection, allowed)
    noiseless = Mechanism(
        sampling_prob=float(sampling_prob),
        num_updates=int(num_updates),
        noise_multiplier=0.0,
        neighboring_relation=neighboring_relation,
        selection=selection,
        allocated=allocated,
    )
    if bands is not None:
        bands = int(bands)
    else:
        bands = _cached(_least_error, noiseless, float(epsilon), float(delta))
    if bands != 1:
        strategy = _cached(factorization.strategy, int(num_updates), bands)
        noiseless = dataclasses.replace(noiseless, strategy=strategy)
    noise_multiplier = _cached(_calibrate, float(epsilon), float(delta), noiseless)
    mechanism = dataclasses.replace(noiseless, noise_multiplier=noise_multiplier)
    if selection is not None:  # or else it would fail after the training
        selection.score_noise(epsilon, delta, neighboring_relation)
    spent = mechanism.epsilon(delta)
    if not spent <= epsilon:
        raise UserError(
            f"the cached noise multiplier {noise_multiplier:g} spends epsilon"
            f" {spent:g}, more than {epsilon:g}: delete the cache (DPMIX_JAX_CACHE or"
            " ~/.cache/dpmix_jax)"
        )
    return mechanism


def _least_error(noiseless: Mechanism, epsilon: float, delta: float) -> int:
    """Returns the number of bands whose noise, by RDP, disturbs sums least."""
    best, least = 1, math.inf
    for bands in sorted({*(2**k for k in range(11)), *(3 * 2**k for k in range(10))}):
        if bands * noiseless.sampling_prob > 1 or bands > noiseless.num_updates:
            break
        strategy = _cached(factorization.strategy, noiseless.num_updates, bands)
        needed = noise_by_rdp(
            dataclasses.replace(noiseless, strategy=strategy), epsilon, delta
        )
        error = needed * factorization.error(strategy, noiseless.num_updates)
        if error >= least:  # or infinite, where RDP bounds nothing
            break
        best, least = bands, error
    return best


def noise_by_rdp(noiseless: Mechanism, epsilon: float, delta: float) -> float:
    """Returns the noise multiplier that RDP asks for: quick to find, but too large.

    Args:
      noiseless: a mechanism, whose own noise multiplier does not matter.
      epsilon: the budget.
      delta: in (0, 1).

    Returns:
      The least in [0.1, 10000]; infinity if it lies outside, and for `REPLACE_ONE`.
    """

    def excess(log_noise: float) -> float:
        each = dataclasses.replace(noiseless, noise_multiplier=math.exp(log_noise))
        return min(each.epsilon(delta, accountant="rdp"), 1e9) - epsilon

    lowest, highest = math.log(0.1), math.log(1e4)
    if excess(lowest) < 0 or excess(highest) > 0:
        return math.inf
    return math.exp(scipy.optimize.brentq(excess, lowest, highest, xtol=1e-4))
