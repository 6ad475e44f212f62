"""The augmentation set of one record: views of it, and mixups of pairs of those views.

One record [H, W, C] with soft label [O] becomes K images [K, H, W, C] with soft labels
[K, O]. The gradient of the record is the average over the set, so the set must come
from that record, a key and public data alone.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpmix_jax import augment
from dpmix_jax.errors import UserError

METHODS = ("dp_sgd", "self_aug", "dp_mix_self")

RecordSet = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Which images a record's gradient is averaged over (DP-Mix, Section 3).

    Attributes:
      name: `dp_sgd` (the image itself), `self_aug` (`k_base` views) or `dp_mix_self`
        (`k_base` views and `k_self` mixups of pairs of them).
      k_base: number of views; `dp_sgd` ignores it.
      k_self: number of mixups; only `dp_mix_self` uses it.
      alpha: a mixing weight is drawn from Beta(alpha, alpha).
      distinct_pairs: a pair is two different members of the pool. If False it may be
        twice the same view, which makes the mixup that view again.
    """

    name: str = "dp_mix_self"
    k_base: int = 16
    k_self: int = 18
    alpha: float = 0.2
    distinct_pairs: bool = True

    def __post_init__(self):
        if self.name not in METHODS:
            raise UserError(
                f"method.name is {self.name!r}: it must be one of {', '.join(METHODS)}"
            )
        if self.name != "dp_sgd" and self.k_base < 1:
            raise UserError(f"method.k_base is {self.k_base}: it must be at least 1")
        if self.k_self < 0:
            raise UserError(f"method.k_self is {self.k_self}: it must be at least 0")
        if not 0 < self.alpha < float("inf"):
            raise UserError(
                f"method.alpha is {self.alpha}: it must be positive and finite"
            )
        if self.num_mixes and self.distinct_pairs and self.k_base < 2:
            raise UserError(
                f"method.k_base is {self.k_base}: pairs of distinct views need at"
                " least 2; raise it or set method.distinct_pairs to False"
            )

    @property
    def num_views(self) -> int:
        return 1 if self.name == "dp_sgd" else self.k_base

    @property
    def num_mixes(self) -> int:
        return self.k_self if self.name == "dp_mix_self" else 0

    @property
    def set_size(self) -> int:
        """K, the images that one record's gradient is averaged over."""
        return self.num_views + self.num_mixes


def random_pairs(
    key: jax.Array, pool_size: int, num_pairs: int, *, distinct: bool
) -> tuple[jax.Array, jax.Array]:
    """Draws `num_pairs` ordered pairs uniformly from a pool, both ends reachable.

    Args:
      key: scalar key.
      pool_size: P; at least 2 if `distinct`.
      num_pairs: M.
      distinct: uniform over the P(P-1) pairs of different members, else over all P^2.

    Returns:
      Two int32 arrays [M] with values in [0, P).
    """
    first_key, second_key = jax.random.split(key)
    first = jax.random.randint(first_key, (num_pairs,), 0, pool_size)
    if not distinct:
        return first, jax.random.randint(second_key, (num_pairs,), 0, pool_size)
    # A step of 1 to P-1 around the pool reaches every other member with equal chance.
    step = jax.random.randint(second_key, (num_pairs,), 1, pool_size)
    return first, (first + step) % pool_size


def mixups(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    num_mixes: int,
    *,
    alpha: float,
    distinct_pairs: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Mixes pairs of a pool, w x_i + (1 - w) x_j, labels alike (Zhang et al., 2018).

    Formal guarantees:
      - The mixes depend on this pool and this key alone.

    Args:
      key: scalar key.
      images: [P, H, W, C] floating-point pool.
      labels: [P, O] soft labels.
      num_mixes: M.
      alpha: one weight w ~ Beta(alpha, alpha) is drawn for each mix.
      distinct_pairs: see `MethodConfig`.

    Returns:
      [M, H, W, C] images and [M, O] soft labels.
    """
    pair_key, weight_key = jax.random.split(key)
    first, second = random_pairs(
        pair_key, images.shape[0], num_mixes, distinct=distinct_pairs
    )
    weights = jax.random.beta(weight_key, alpha, alpha, (num_mixes,), images.dtype)

    def mix(pool):
        w = weights.reshape((num_mixes,) + (1,) * (pool.ndim - 1)).astype(pool.dtype)
        return w * pool[first] + (1 - w) * pool[second]

    return mix(images), mix(labels)


def augmentation_set(
    method: MethodConfig, augmentation: augment.AugmentationConfig
) -> RecordSet:
    """Returns the function that makes the augmentation set of one record.

    Formal guarantees (of the returned function):
      - The set depends on this record and this key alone, for every method.
      - With k_self = 0, `dp_mix_self` makes the very set of `self_aug`; `dp_sgd` makes
        the record itself.

    Args:
      method: sizes of the set.
      augmentation: how views are drawn.

    Returns:
      `f(key, image [H, W, C], label [O]) -> images [K, H, W, C], labels [K, O]`, for
      one record; use `jax.vmap` for several.
    """

    def record_set(key, image, label):
        view_key, mix_key = jax.random.split(key)
        if method.name == "dp_sgd":
            return image[None], label[None]
        images = augment.views(
            view_key, image, method.num_views, augmentation=augmentation
        )
        labels = jnp.broadcast_to(label, (method.num_views, *label.shape))
        if method.num_mixes == 0:
            return images, labels
        mixed_images, mixed_labels = mixups(
            mix_key,
            images,
            labels,
            method.num_mixes,
            alpha=method.alpha,
            distinct_pairs=method.distinct_pairs,
        )
        return (
            jnp.concatenate([images, mixed_images]),
            jnp.concatenate([labels, mixed_labels]),
        )

    return record_set
