"""Naive mixup across records, clipped for each microbatch: what DP-Mix improves on.

Views of a record are mixed with those of the other records of its group (Zhang et al.,
2018, under DP-SGD with microbatches; DP-Mix, Section 3). The gradient of a group is one
term of the sum, clipped once, so no record owns a term, and one record can move the sum
by twice the clip norm. The module brings what differs from methods of single records:
the groups of a batch, the set of a group, and the sensitivity.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy import clipping

from dpmix_jax import augment, mixup, sampling
from dpmix_jax.errors import require

NAME = "microbatch_mixup"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicrobatchMixupConfig:
    """The method's sizes, in place of a `mixup.MethodConfig`.

    Attributes:
      name: `microbatch_mixup`.
      k_base: views of a record, each of which is mixed.
      group_size: m; a batch is divided into B / m groups, which differ in size.
      alpha: a mixing weight is drawn from Beta(alpha, alpha).
    """

    name: str = NAME
    k_base: int = 16
    group_size: int = 2
    alpha: float = 0.2

    def __post_init__(self):
        for key, least in (("k_base", 1), ("group_size", 2)):
            size = getattr(self, key)
            require(size >= least, f"method.{key}", size, f"at least {least}")
        finite = 0 < self.alpha < math.inf
        require(finite, "method.alpha", self.alpha, "positive and finite")

    num_views = 0  # the set holds mixes only
    num_public = 0

    @property
    def set_size(self) -> int:
        """The images that one record brings into its group's gradient."""
        return self.k_base

    def num_groups(self, expected_batch_size: float) -> int:
        """Returns G, the groups that a batch is divided into."""
        return max(1, round(expected_batch_size / self.group_size))


def random_groups(
    seed: int, step: int, indices: np.ndarray, *, num_records: int, num_groups: int
) -> list[np.ndarray]:
    """Puts each record of a batch into a group, independently of the others.

    Were groups filled one after the other, a record that joins would shift all after
    it, and every later group would change. Here it changes its own group only; the
    price is that groups differ in size, and that some have a single record.

    Formal guarantees:
      - The group of a record is uniform, independent of the batch and of the groups of
        the others, and a pure function of (seed, step, its index).

    Args:
      seed: the seed of the run (see `sampling.stream_key`).
      step: the update, from 0.
      indices: [n] records of its batch, as from `sampling.poisson_batch`.
      num_records: N.
      num_groups: G, a constant: n must not matter.

    Returns:
      int32 arrays [g, c], a row for each group that is not empty: its records, then -1.
      Groups of one array have the same c, the least power of two that holds them: so
      few shapes are compiled, and no group's depends on another group.
    """
    rng = sampling.generator(seed, "groups", step)
    group_of = rng.integers(0, num_groups, num_records)[indices]
    by_capacity: dict[int, list[np.ndarray]] = {}
    for group in np.unique(group_of):
        members = indices[group_of == group]
        capacity = _capacity(len(members))
        row = np.full(capacity, -1, np.int32)
        row[: len(members)] = members
        by_capacity.setdefault(capacity, []).append(row)
    return [np.stack(by_capacity[capacity]) for capacity in sorted(by_capacity)]


def batches(
    seed: int,
    *,
    num_records: int,
    sampling_prob: float,
    microbatch_size: int,
    num_groups: int,
    num_devices: int = 1,
) -> Callable[[int], list[np.ndarray]]:
    """Returns the function from an update to the microbatches of its groups.

    Args:
      seed: of the run.
      num_records: N.
      sampling_prob: q.
      microbatch_size: records of a microbatch, about, padding counted.
      num_groups: G.
      num_devices: a microbatch has a multiple of it of groups.

    Returns:
      A function to int32 arrays [g, c], see `random_groups`; groups that are padding
      have no record.
    """

    def draw(step: int) -> list[np.ndarray]:
        batch = sampling.poisson_batch(
            seed, step, num_records=num_records, sampling_prob=sampling_prob
        )
        groups = random_groups(
            seed, step, batch, num_records=num_records, num_groups=num_groups
        )
        return [
            part
            for alike in groups
            for part in sampling.microbatches(
                alike, _groups_at_once(microbatch_size, alike.shape[1], num_devices)
            )
        ]

    return draw


def blank_microbatch(
    method: MicrobatchMixupConfig, microbatch_size: int, num_devices: int
) -> np.ndarray:
    """Returns indices of nothing, of the shape that a microbatch of groups has."""
    capacity = _capacity(2 * method.group_size)
    groups = _groups_at_once(microbatch_size, capacity, num_devices)
    return np.full((groups, capacity), -1, np.int32)


def _groups_at_once(microbatch_size: int, capacity: int, num_devices: int) -> int:
    return max(1, microbatch_size // (capacity * num_devices)) * num_devices


def _capacity(size: int) -> int:
    """Returns the least power of two that is no less."""
    return 1 << (size - 1).bit_length()


def group_set(
    method: MicrobatchMixupConfig, augmentation: augment.AugmentationConfig
) -> mixup.RecordSet:
    """Returns the function that makes the mixed set of one group of records.

    Every view of a record is mixed with a view of another record of the group, if there
    is one.

    Formal guarantees (of the returned function):
      - The set depends on the records of this group and their keys alone; the pixels
        that stand for an absent record do not matter.

    Args:
      method: `k_base`, the views of a record, and `alpha`.
      augmentation: how views are drawn.

    Returns:
      `f(keys [c], images [c, H, W, C], labels [c, O], pool=None) -> images
      [c k_base, H, W, C], labels [c k_base, O]`. Members come first; a label of zeros
      says that there is none. Labels are scaled by c over the number of members, so
      that the mean over all c k_base images of a loss that is linear in the label, such
      as cross-entropy, is the mean over those of members.
    """

    def mixed_group(keys, images, labels, pool=None) -> mixup.ImageSet:
        del pool
        present = labels.sum(axis=-1) > 0
        count, capacity = present.sum(), present.shape[0]
        images = jnp.where(present[:, None, None, None], images, 0)
        view_keys, weight_keys, partner_keys = jax.vmap(
            lambda key: jax.random.split(key, 3), out_axes=1
        )(keys)
        views = jax.vmap(
            functools.partial(augment.views, k=method.k_base, augmentation=augmentation)
        )(view_keys, images)
        weights = jax.vmap(
            lambda key: jax.random.beta(
                key, method.alpha, method.alpha, (method.k_base,), images.dtype
            )
        )(weight_keys)
        # One rotation of the members for each view; none of them meets itself, unless
        # it is alone.
        turns = jax.random.randint(
            partner_keys[0], (method.k_base,), 1, jnp.maximum(count, 2)
        )
        members = jnp.arange(capacity)[:, None]
        partners = (members + turns[None]) % jnp.maximum(count, 1)
        others = views[partners, jnp.arange(method.k_base)]
        w = weights[..., None, None, None]
        soft = weights[..., None].astype(labels.dtype)
        scale = (capacity / jnp.maximum(count, 1)).astype(labels.dtype)
        mixed = soft * labels[:, None] + (1 - soft) * labels[partners]
        mixed = jnp.where(present[:, None, None], mixed * scale, 0)
        seen = jnp.where(
            present[:, None, None, None, None], w * views + (1 - w) * others, 0
        )
        return _flat(seen), _flat(mixed)

    return mixed_group


def _flat(array: jax.Array) -> jax.Array:
    """[c, k, ...] -> [c k, ...]."""
    return array.reshape(-1, *array.shape[2:])


def of_groups(
    gradient_fn: clipping.BoundedSensitivityCallable,
) -> clipping.BoundedSensitivityCallable:
    """Gives a clipped sum the sensitivity that it has over groups of records.

    `.sensitivity(REPLACE_ONE)` is 4 C, though replacing a member moves its group's
    term by 2 C at most: the accountant treats a replacement as a removal and an
    addition, and each of the two may move the sum by 2 C.

    Formal guarantees:
      - If no record is in two groups, and its group depends on no other record, every
        sensitivity is twice that of `gradient_fn`: a record that joins or leaves takes
        its group's term from one vector of norm at most C to another.

    Args:
      gradient_fn: from `gradients.clipped_gradient`, to be called with sets of groups,
        such as those of `group_set`.
    """
    return clipping.BoundedSensitivityCallable(
        gradient_fn, 2 * gradient_fn.l2_norm_bound, has_aux=True
    )
