"""The privacy budget, and the noise that turns a clipped sum into a private mean."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from dp_accounting import NeighboringRelation
from jax_privacy import clipping

from dpmix_jax import noise
from dpmix_jax.accounting import RELATIONS, Mechanism, calibrate
from dpmix_jax.errors import UserError, require, require_one_of
from dpmix_jax.gradients import WEIGHTS
from dpmix_jax.selection import Selection

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """What is promised, and the parts of the algorithm that the promise rests on.

    Attributes:
      epsilon: the budget to be spent by the last update.
      delta: in (0, 1), less than 1 / (number of records) if it is to mean something.
      expected_batch_size: B; each record is sampled with probability B / N.
      num_updates: T.
      l2_clip_norm: C, the bound on a record's averaged gradient.
      clipping_rule: `clip` shortens long gradients to C; `automatic` brings nearly all
        of them to C, so that under SGD without weight decay only the product of C and
        the learning rate matters (see `gradients.automatic`).
      per_layer: whether each layer is clipped by its own norm, see
        `gradients.clipped_gradient`.
      neighboring_relation: `add_or_remove_one`, `replace_one` or `replace_special`
        (one record becomes an empty one).
      selection: None for a run that is released whatever its result is. Otherwise the
        run is a candidate of a private selection, and `selection` names the
        distribution of the number of candidates, see `Selection`. Epsilon is then what
        all candidates and the choice spend together, and each candidate's noise is
        larger.
      expected_candidates: mean number of candidates; None without selection.
      mechanism: `gaussian` adds independent noise in every update; `bandmf` noise that
        is correlated between updates, see `factorization`.
      bands: b, for `bandmf` only; None tries 1, 2, 3, 4, 6, 8, 12, 16 and so on until
        the error of the sums of gradients stops falling, see `calibrate`.
      sampling: `poisson`, or `allocation`, by which each record is in one batch of an
        epoch, see `sampling.allocated_batch`; B must then be N over a whole number of
        batches, rounded.
      uncovered: what else of this run was chosen by looking at the private records, in
        words, such as "the learning rate"; the statement tells it.
    """

    epsilon: float
    delta: float = 1e-5
    expected_batch_size: int
    num_updates: int
    l2_clip_norm: float = 1.0
    clipping_rule: str = "clip"
    per_layer: bool = False
    neighboring_relation: str = "add_or_remove_one"
    selection: str | None = None
    expected_candidates: float | None = None
    mechanism: str = "gaussian"
    bands: int | None = None
    sampling: str = "poisson"
    uncovered: str = ""

    def __post_init__(self):
        batch, selection = self.expected_batch_size, self.selection
        for key, valid, allowed in (
            ("epsilon", 0 < self.epsilon < math.inf, "positive and finite"),
            ("delta", 0 < self.delta < 1, "in (0, 1)"),
            ("expected_batch_size", 0 < batch < math.inf, "at least 1"),
            ("num_updates", 0 < self.num_updates < math.inf, "at least 1"),
            ("l2_clip_norm", 1e-10 <= self.l2_clip_norm <= 1e10, "in [1e-10, 1e10]"),
            (
                "expected_candidates",
                (selection is None) == (self.expected_candidates is None),
                f"{'None without' if selection is None else 'a number for'}"
                " privacy.selection",
            ),
        ):
            require(valid, f"privacy.{key}", getattr(self, key), allowed)
        require_one_of("privacy.mechanism", self.mechanism, ("gaussian", "bandmf"))
        require(
            self.bands is None or self.mechanism == "bandmf",
            "privacy.bands",
            self.bands,
            "None for privacy.mechanism 'gaussian'",
        )
        relation = self.neighboring_relation
        require_one_of("privacy.sampling", self.sampling, ("poisson", "allocation"))
        for key, plain in (
            ("neighboring_relation", "add_or_remove_one"),
            ("selection", None),
            ("mechanism", "gaussian"),
        ):
            value, allowed = getattr(self, key), f"{plain!r} for privacy.sampling"
            fits = self.sampling == "poisson" or value == plain
            require(fits, f"privacy.{key}", value, f"{allowed} 'allocation'")
        require_one_of("privacy.neighboring_relation", relation, RELATIONS)
        require_one_of("privacy.clipping_rule", self.clipping_rule, WEIGHTS)
        if self.private_selection and relation == "replace_one":
            raise UserError(
                "privacy.selection must be None for privacy.neighboring_relation"
                " 'replace_one', for which nothing bounds it"
            )

    @property
    def relation(self) -> NeighboringRelation:
        return RELATIONS[self.neighboring_relation]

    @property
    def private_selection(self) -> Selection | None:
        """Returns how the released run is chosen, or None if there is no choice."""
        if self.selection is None or self.expected_candidates is None:
            return None
        return Selection(
            distribution=self.selection, expected_candidates=self.expected_candidates
        )

    def calibrate(self, sampling_prob: float) -> Mechanism:
        """Returns `calibrate` of this budget, at a sampling probability q."""
        return calibrate(
            epsilon=self.epsilon,
            delta=self.delta,
            sampling_prob=sampling_prob,
            num_updates=self.num_updates,
            neighboring_relation=self.relation,
            selection=self.private_selection,
            bands=1 if self.mechanism == "gaussian" else self.bands,
            allocated=self.sampling == "allocation",
        )

    def sampling_prob(self, num_records: int) -> float:
        """Returns q = B / N, or raises `UserError` if that is no probability.

        For random allocation it is 1 over the number of batches in an epoch.
        """
        size, key = self.expected_batch_size, "privacy.expected_batch_size"
        allowed = f"at most the number of training records, {num_records}"
        require(size <= num_records, key, size, allowed)
        if self.sampling == "poisson":
            return size / num_records
        batches = round(num_records / size)
        whole = round(num_records / batches)
        allowed = (
            f"{num_records} records over a whole number of batches, such as {whole}"
        )
        require(size == whole, key, size, f"{allowed}, for privacy.sampling")
        return 1 / batches


class NoiseState(NamedTuple):
    """State that determines all noise to come: secret, and for checkpoints only.

    Attributes:
      key: uint32 [8], the key of the next update's noise.
      sums: float32 [b - 1, d], with b bands the clipped sums of the last b - 1 updates,
        without any noise, the latest first; None for independent noise.
      outputs: the same sums with noise, in the same shape and order.
    """

    key: jax.Array
    sums: jax.Array | None = None
    outputs: jax.Array | None = None


def privatizer(
    gradient_fn: clipping.BoundedSensitivityCallable,
    mechanism: Mechanism,
    *,
    expected_batch_size: float,
    key: jax.Array,
) -> optax.GradientTransformation:
    """Turns the clipped sum of one update into a private mean: noise, then divide.

    Chain it before any optimizer; what follows is post-processing.

    Formal guarantees:
      - With independent noise, adds Gaussian noise of standard deviation
        `noise_multiplier` times `gradient_fn.sensitivity(neighboring_relation)` to
        every coordinate of the sum, once per update, on a grid to which the sum is
        rounded; the noise is larger by what rounding adds to the sensitivity. See
        `noise` for how near to Gaussian.
      - The noise of each update comes from a key of its own, which the state carries,
        and from which that of no earlier update can be drawn again. (A second `init`
        starts the same noise again.) With b bands the state also holds the last b - 1
        sums without noise, which `without_sums` takes out.
      - Divides by the expected batch size, a constant, never by the drawn one.
      - With a strategy c of b bands, the noise of the first line has its standard
        deviation times the norm of c over c_0. It is added to the sum of this update
        plus c_k / c_0 times that of the k-th before it, for 0 < k < b. The output is
        post-processing of that: it subtracts c_k / c_0 times the output of the k-th
        update before.

    Args:
      gradient_fn: from `clipped_gradient`; its sensitivity sets the scale.
      mechanism: from `calibrate`. The batches must be those that it accounts for:
        `sampling.batches(..., bands=mechanism.bands, allocated=mechanism.allocated)`.
      expected_batch_size: B = q N, positive and finite.
      key: uint32 [8] from `noise_key`, secret.

    Raises:
      UserError: if `expected_batch_size` or `key` is not as stated. `init` raises it
        under `jax.jit`. `update` raises it under `jax.jit` if the state is not an
        argument of the compiled function, and wherever `noise.grid` has no room for so
        much noise or so many parameters.

    Example:
      >>> gradient_fn = dpm.clipped_gradient(lambda w, x: w @ x, l2_clip_norm=1.0)
      >>> mechanism = dpm.Mechanism(
      ...     sampling_prob=0.1, num_updates=60, noise_multiplier=2.0
      ... )
      >>> noise = dpm.privatizer(
      ...     gradient_fn, mechanism, expected_batch_size=100, key=dpm.noise_key(1234)
      ... )
      >>> optimizer = optax.chain(noise, optax.sgd(1.0))
    """
    size = expected_batch_size
    require(0 < size < math.inf, "expected_batch_size", size, "positive and finite")
    is_key = getattr(key, "shape", None) == (8,) and key.dtype == jnp.uint32
    require(is_key, "key", key, "uint32 [8], such as noise_key(seed)")
    sensitivity = gradient_fn.sensitivity(mechanism.neighboring_relation)
    first, *later = mechanism.strategy
    of_all_bands = sensitivity * math.hypot(*mechanism.strategy) / first
    share = jnp.array(later, jnp.float32) / jnp.float32(first)

    def init(params):
        own = jnp.array(key)
        if isinstance(own, jax.core.Tracer):
            raise UserError(
                "init is called under jax.jit or its like: call it outside, for the"
                " compiled program, which JAX may write to disk, would hold the key"
            )
        if not later:
            return NoiseState(own)
        shape = len(later), sum(leaf.size for leaf in jax.tree.leaves(params))
        blanks = (jnp.zeros(shape, jnp.float32) for _ in range(2))
        return NoiseState(own, *blanks)

    @jax.jit  # hundreds of operations: one by one they would take half a second
    def private_mean(gradients, state):
        gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)
        total, restored = jax.flatten_util.ravel_pytree(gradients)
        # A record's term enters the sums of b updates, each rounded to the grid.
        on = noise.grid(
            mechanism.noise_multiplier, of_all_bands, total.size * mechanism.bands
        )
        next_key = noise.next_key(state.key)
        if not later:
            noisy = noise.add_noise(total, state.key, on)
            return restored(noisy * jnp.float32(1 / size)), NoiseState(next_key)

        def weighted(past):
            return jnp.tensordot(share, past, 1, precision="highest")

        noisy = noise.add_noise(total + weighted(state.sums), state.key, on)
        noisy = noisy - weighted(state.outputs)  # which no longer needs privacy
        sums, outputs = (
            jnp.concatenate([new[None], past[:-1]])
            for new, past in ((total, state.sums), (noisy, state.outputs))
        )
        private = restored(noisy * jnp.float32(1 / size))
        return private, NoiseState(next_key, sums, outputs)

    def update(gradients, state, params=None):
        del params  # of any type
        if not isinstance(state.key, jax.core.Tracer) and any(
            isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(gradients)
        ):
            raise UserError(
                "update is called under jax.jit or its like with a state that is not an"
                " argument of the compiled program, which would hold the key"
            )
        return private_mean(gradients, state)

    return optax.GradientTransformation(init, update)


def without_sums(state: PyTree) -> PyTree:
    """Sets sums without noise to 0 in the state of a finished run, see `NoiseState`.

    Args:
      state: of an optimizer that is chained with a `privatizer`.
    """

    def emptied(part):
        if isinstance(part, NoiseState) and part.sums is not None:
            return part._replace(sums=jnp.zeros_like(part.sums))
        return part

    return jax.tree.map(emptied, state, is_leaf=lambda x: isinstance(x, NoiseState))
