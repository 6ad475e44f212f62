"""Checks that a guarantee holds, by running what gives it.

`check_sensitivity` replays a clipped sum on neighbouring records: a sum that moves
further than its noise is scaled for is found without any statistics. `audit` trains
once with canaries, half of them left out at random, guesses which, and bounds epsilon
from below by how often the guesses are right. A bound above the claim shows a fault, at
the confidence asked for; a bound below it shows nothing, for there are other attacks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import NeighboringRelation
from jax_privacy import auditing, clipping
from scipy import signal, special

from dpmix_jax import accounting, gradients, privacy, sampling
from dpmix_jax.errors import require

PyTree = Any
ClippedSum = Callable[[PyTree, np.ndarray], PyTree]
MakeGradient = Callable[..., clipping.BoundedSensitivityCallable]

# What a record may hold that is hard to clip: no numbers, overflow, underflow.
_FLOATS = {
    name: float(name)
    for name in ("NaN", "inf", "-inf", "1e6", "1e30", "-3e38", "1e-40", "0")
}
_BYTES = {"0": 0, "255": 255}


# --- Replay -----------------------------------------------------------------------


def check_sensitivity(
    clipped_sum: ClippedSum,
    records: PyTree,
    sensitivity: Callable[[NeighboringRelation], float],
    *,
    indices: Sequence[int] | None = None,
    tolerance: float = 1e-4,
) -> dict[str, float]:
    """Replays a clipped sum on neighbours of a batch, under the same keys.

    Each neighbour removes one record, puts another record of the batch in its place, or
    changes its numbers. Floats are negated, or set to a NaN, infinite, huge, subnormal
    or zero number; bytes are set to 0 or 255. Both are set throughout, or in the first
    eighth only. This is the cheapest test there is of an implementation (Cebere et al.,
    2026): noise and accountant are right only if no neighbour moves the sum further
    than promised.

    Args:
      clipped_sum: `f(records, is_padding_example [B]) -> pytree`, everything that
        happens before the noise, with fixed parameters and keys.
      records: arrays with a leading axis B of records, at least 2.
      sensitivity: what is promised, as `.sensitivity` of a clipped gradient.
      indices: of the records that change; all by default.
      tolerance: relative, for float rounding.

    Returns:
      The distance that the sum moves, by neighbour.

    Raises:
      AssertionError: if a neighbour moves the sum further than the sensitivity and
        `tolerance` allow, if a sum is not finite, or if the same records give two
        different sums.

    Example:
      >>> gradient_fn = dpm.clipped_gradient(lambda w, x: w @ x, l2_clip_norm=1.0)
      >>> def clipped_sum(records, is_padding):
      ...     return gradient_fn(jnp.ones(2), records, is_padding_example=is_padding)[0]
      >>> promised = gradient_fn.sensitivity
      >>> moved = dpm.check_sensitivity(clipped_sum, jnp.eye(2), promised)
      >>> moved["record 0 removed"], moved["record 0 negated"]
      (1.0, 2.0)
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(records)]
    structure, size = jax.tree.structure(records), len(leaves[0])
    removing, replacing = (
        sensitivity(relation) * (1 + tolerance)
        for relation in (
            NeighboringRelation.ADD_OR_REMOVE_ONE,
            NeighboringRelation.REPLACE_ONE,
        )
    )
    everyone = np.zeros(size, bool)

    def total(changed, padding=everyone):
        found = clipped_sum(jax.tree.unflatten(structure, changed), padding)
        flat = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(found)]
        return np.concatenate(flat)

    whole = total(leaves)
    if not np.isfinite(whole).all():
        raise AssertionError("the sum of the records is not finite")
    if not np.array_equal(whole, total(leaves)):
        raise AssertionError("the same records gave two sums: keys must be fixed")
    distances = {}
    for index in range(size) if indices is None else np.arange(size)[list(indices)]:
        rest = total(leaves, np.arange(size) == index)
        name = f"record {index} removed"
        distances[name] = _distance(name, whole, rest, removing)
        for change, changed in _replaced(leaves, index):
            name, other = f"record {index} {change}", total(changed)
            _distance(f"{name}, then removed", other, rest, removing)
            distances[name] = _distance(name, whole, other, replacing)
    return distances


def _distance(name: str, first: np.ndarray, second: np.ndarray, bound: float) -> float:
    distance = float(np.linalg.norm(first - second))
    if not distance <= bound:
        raise AssertionError(f"{name}: the sum moves by {distance:.6g} of {bound:.6g}")
    return distance


def _replaced(
    leaves: list[np.ndarray], index: int
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yields neighbours in which one record is another, and how it was changed."""

    def with_record(change):
        changed = [leaf.copy(order="C") for leaf in leaves]
        for number, leaf in enumerate(changed):
            change(number, leaf[index : index + 1].reshape(-1))  # a view
        return changed

    def copy(other, number, own):
        own[:] = leaves[number][other].reshape(-1)

    def negate(number, own):
        if jnp.issubdtype(own.dtype, jnp.floating):
            own *= -1

    def fill(kind, part, value, number, own):
        if jnp.issubdtype(own.dtype, kind):
            own[: -(-own.size // part)] = value

    for other in range(len(leaves[0])):
        if other != index:
            yield f"as record {other}", with_record(functools.partial(copy, other))
    yield "negated", with_record(negate)
    for kind, values in ((jnp.floating, _FLOATS), (np.uint8, _BYTES)):
        for name, value in values.items():
            if any(jnp.issubdtype(leaf.dtype, kind) for leaf in leaves):
                for part, where in ((1, ""), (8, "first numbers ")):
                    change = functools.partial(fill, kind, part, value)
                    yield f"{where}{name}", with_record(change)


# --- Canaries ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """What one run with canaries shows.

    Attributes:
      epsilon: lower bound at `delta` with probability `confidence`, whatever the
        mechanism is (Steinke et al., 2023).
      epsilon_gaussian: lower bound under the assumption that the mechanism is no worse
        than some Gaussian mechanism (Mahloujifar et al., 2024). It is larger. For
        subsampling nobody has proven the assumption.
      delta: of the claim.
      confidence: that the bound holds.
      num_canaries: m.
      auroc: of the scores; 0.5 is a coin.
      false_positives: rates [n] of the ROC curve.
      true_positives: rates [n].
    """

    epsilon: float
    epsilon_gaussian: float
    delta: float
    confidence: float
    num_canaries: int
    auroc: float
    false_positives: np.ndarray
    true_positives: np.ndarray


def audit(
    train: Callable[[np.ndarray], np.ndarray],
    num_canaries: int,
    *,
    delta: float,
    rng: np.random.Generator,
    confidence: float = 0.95,
) -> Audit:
    """Audits a training function in one run (Steinke et al., 2023).

    Args:
      train: `f(included [m] bool) -> scores [m]` trains with the canaries included
        only, and scores all: the higher, the more a canary seems to be included.
      num_canaries: m, at least 8.
      delta: of the claim, in (0, 1).
      rng: draws which canaries are included.
      confidence: in (0.5, 1).

    Raises:
      UserError: for an argument out of its range.
    """
    require(0.5 < confidence < 1, "confidence", confidence, "in (0.5, 1)")
    require(0 < delta < 1, "delta", delta, "in (0, 1)")
    require(num_canaries >= 8, "num_canaries", num_canaries, "at least 8")
    included = np.zeros(num_canaries, bool)
    while included.all() or not included.any():
        included = rng.random(num_canaries) < 0.5
    return bound(train(included), included, delta=delta, rng=rng, confidence=confidence)


def bound(
    scores: np.ndarray,
    included: np.ndarray,
    *,
    delta: float,
    rng: np.random.Generator,
    confidence: float = 0.95,
) -> Audit:
    """Bounds epsilon by the scores of canaries, each included by a fair coin.

    Guessed as included are the m/2, m/4, m/8, ... highest scores, numbers fixed before
    any score is seen, and each at its share of the error (Bonferroni).

    Args:
      scores: [m], m at least 8. Ties are broken at random; what is not finite is
        lowest.
      included: [m] bool, neither all nor none: coins are thrown again then.
      delta: of the claim.
      rng: breaks ties.
      confidence: that the bound holds, in (0, 1).

    Raises:
      UserError: for an argument that is none of these.
    """
    size, included = len(scores), np.asarray(included)
    require(size >= 8, "num_canaries", size, "at least 8")
    require(0 < delta < 1, "delta", delta, "in (0, 1)")
    require(included.dtype == bool, "included.dtype", included.dtype.name, "bool")
    require(0 < confidence < 1, "confidence", confidence, "in (0, 1)")
    finite = np.where(np.isfinite(scores), scores, -np.inf)
    lowest_first = np.lexsort((rng.random(size), finite))
    ranks = np.empty(size)
    ranks[lowest_first] = np.arange(size)
    mixed = 0 < included.sum() < size
    require(bool(mixed), "included", included, "neither all nor none")
    auditor = auditing.CanaryScoreAuditor(ranks[included], ranks[~included])
    guesses = [size // 2**k for k in range(1, 8) if size // 2**k >= 4]

    # All or none are thrown with a chance of 2^(1 - m), and then the coins again.
    significance = (1 - confidence) * (1 - 2.0 ** (1 - size)) / len(guesses)

    def best(estimate):
        return max(
            float(
                estimate(
                    significance=significance,
                    delta=delta,
                    threshold_strategy=auditing.Explicit(size - number),
                )
            )
            for number in guesses
        )

    order = included[lowest_first[::-1]]
    return Audit(
        epsilon=best(auditor.epsilon_one_run),
        epsilon_gaussian=best(auditor.epsilon_one_run_fdp),
        delta=delta,
        confidence=confidence,
        num_canaries=size,
        auroc=float(auditor.attack_auroc()),
        false_positives=np.concatenate([[0.0], np.cumsum(~order) / (~order).sum()]),
        true_positives=np.concatenate([[0.0], np.cumsum(order) / order.sum()]),
    )


def gradient_canaries(
    mechanism: accounting.Mechanism,
    num_canaries: int,
    *,
    seed: int,
    l2_clip_norm: float = 1.0,
    make_gradient: MakeGradient = gradients.clipped_gradient,
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a `train` for `audit` that attacks sampler, clip, sum and noise at once.

    The gradient of each canary is along an axis of its own and far longer than C
    (Steinke et al., 2023, "Dirac canary"). The attacker sees the noisy sum of every
    update, and scores a canary by its likelihood ratio: nothing tells more of it.
    Nothing is learned, so it takes seconds. A canary is in or out; for `REPLACE_ONE`
    the noise is twice what that needs, and the bound accordingly weak.

    Args:
      mechanism: what is claimed: its q, T and sigma are run.
      num_canaries: m, the number of parameters too.
      seed: of batches and noise.
      l2_clip_norm: C.
      make_gradient: `clipped_gradient` or another of its kind.
    """
    gradient_fn = make_gradient(
        lambda params, axis: 1000.0 * l2_clip_norm * (params * axis).sum(),
        l2_clip_norm=l2_clip_norm,
    )
    add_noise = privacy.privatizer(
        gradient_fn,
        mechanism,
        expected_batch_size=mechanism.sampling_prob * num_canaries,
        key=sampling.noise_key(seed),
    )
    batches = sampling.batches(
        seed,
        num_records=num_canaries,
        sampling_prob=mechanism.sampling_prob,
        microbatch_size=256,
        bands=mechanism.bands,
        allocated=mechanism.allocated,
    )
    params, update = jnp.zeros(num_canaries), add_noise.update
    # A sum in units of C: 1 where a canary was drawn, and noise.
    unit = mechanism.sampling_prob * num_canaries / l2_clip_norm
    sensitivity = gradient_fn.sensitivity(mechanism.neighboring_relation)
    stddev = mechanism.noise_multiplier * sensitivity / l2_clip_norm

    @jax.jit
    def clipped_sum(indices, is_padding):
        axes = jax.nn.one_hot(indices, num_canaries)
        return gradient_fn(params, axes, is_padding_example=is_padding)[0]

    def train(included: np.ndarray) -> np.ndarray:
        seen, state = [], add_noise.init(params)
        for step in range(mechanism.num_updates):
            total = jnp.zeros(num_canaries)
            for batch in batches(step):
                left_out = batch.mask | ~included[batch.data]
                total += clipped_sum(batch.data, left_out)
            mean, state = update(total, state)
            seen.append(mean * unit)
        return _log_likelihood_ratios(np.stack(seen), mechanism, stddev)

    return train


def _log_likelihood_ratios(
    seen: np.ndarray, mechanism: accounting.Mechanism, stddev: float
) -> np.ndarray:
    """Returns log p(seen | in) / p(seen | out) for each canary, [m].

    Args:
      seen: noisy sums of all updates, [T, m]; a canary adds 1 where it is drawn.
      mechanism: that they came from.
      stddev: of the noise on sums weighted by the strategy, divided by its norm.
    """
    # Noise on weighted sums is independent: what is seen of a canary that is drawn at
    # update t is the strategy, in the weighted sums t, t + 1, ...
    weights = np.asarray(mechanism.strategy) / math.hypot(*mechanism.strategy)
    updates, bands = seen.shape[0], len(weights)
    weighted = signal.lfilter(weights, 1.0, seen, axis=0)
    matches = signal.lfilter(weights, 1.0, weighted[::-1], axis=0)[::-1]
    # The last updates have fewer weighted sums after them than there are bands.
    left = np.minimum(np.arange(updates, 0, -1), bands)
    energy = np.cumsum(weights**2)[left - 1, np.newaxis]
    drawn = (matches - energy / 2) / stddev**2

    # Rows of an epoch's batches, or of updates with one turn each. Updates after the
    # last are never seen: a canary drawn there is as likely as one that is out.
    per_row = mechanism.batches_per_epoch if mechanism.allocated else mechanism.bands
    drawn = np.pad(drawn, [(0, -len(drawn) % per_row), (0, 0)])
    drawn = drawn.reshape(-1, per_row, drawn.shape[-1])
    if mechanism.allocated:
        return (special.logsumexp(drawn, axis=1) - math.log(per_row)).sum(axis=0)
    q = per_row * mechanism.sampling_prob
    with np.errstate(divide="ignore"):  # q may be 1
        of_turns = np.logaddexp(np.log1p(-q), np.log(q) + drawn).sum(axis=0)
    return special.logsumexp(of_turns, axis=0) - math.log(per_row)
