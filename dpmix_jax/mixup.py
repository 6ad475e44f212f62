"""The augmentation set of one record: views, public images, and mixups of pairs.

One record [H, W, C] with soft label [O] becomes K images [K, H, W, C] with soft labels
[K, O]. The gradient of the record is the average over the set, so the set must come
from that record, a key and public data alone. (The sets of `microbatch_mixup` come from
a group of records, and its sensitivity is that of groups: it is there to be compared.)
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dpmix_jax import augment
from dpmix_jax.bank import DRAWS, Bank, draw_rows
from dpmix_jax.errors import UserError

WITH_PUBLIC = ("dp_mix_diff", "pure_dp_mix_diff")
WITH_MIXES = ("dp_mix_self", *WITH_PUBLIC)
OF_GROUPS = ("microbatch_mixup",)
METHODS = ("dp_sgd", "self_aug", *WITH_MIXES, *OF_GROUPS)

Pool = tuple[jax.Array, jax.Array]  # images [P, H, W, C] and soft labels [P, O]
RecordSet = Callable[..., Pool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Which images a record's gradient is averaged over (DP-Mix, Section 3).

    Attributes:
      name: `dp_sgd` (the image itself), `self_aug` (`k_base` views), `dp_mix_self`
        (`k_base` views and `k_self` mixups of pairs of them), `dp_mix_diff` (`k_base`
        views, `k_diff` public images and `k_self` mixups of pairs from both),
        `pure_dp_mix_diff` (that without views: with uniform draws it never looks at a
        private record, and with draws by class at its label only) or
        `microbatch_mixup` (views mixed with those of other records of a group, which
        is clipped as one; see `group_set`).
      k_base: number of views; `dp_sgd` and `pure_dp_mix_diff` ignore it.
      k_self: number of mixups; `dp_sgd`, `self_aug` and `microbatch_mixup` ignore it.
      k_diff: public images drawn for each record and update, flipped and cropped like
        the views; only `dp_mix_diff` and `pure_dp_mix_diff` use it.
      draw: of public images: `uniform` over all, or `class` for those of the record's
        class (see `bank.draw_rows` for why that is safe).
      group_size: m; `microbatch_mixup` divides a batch into B / m groups, which differ
        in size.
      alpha: a mixing weight is drawn from Beta(alpha, alpha).
      distinct_pairs: a pair is two different members of the pool. If False it may be
        twice the same member, which makes the mixup that member again.
    """

    name: str = "dp_mix_self"
    k_base: int = 16
    k_self: int = 18
    k_diff: int = 2
    draw: str = "uniform"
    group_size: int = 2
    alpha: float = 0.2
    distinct_pairs: bool = True

    def __post_init__(self):
        if self.name not in METHODS:
            raise UserError(
                f"method.name is {self.name!r}: it must be one of {', '.join(METHODS)}"
            )
        uses_views = self.name not in ("dp_sgd", "pure_dp_mix_diff")
        for key, used, least in (
            ("k_base", uses_views, 1),
            ("k_self", True, 0),
            ("k_diff", self.name in WITH_PUBLIC, 1),
            ("group_size", self.name in OF_GROUPS, 2),
        ):
            if used and getattr(self, key) < least:
                raise UserError(
                    f"method.{key} is {getattr(self, key)}: it must be at least {least}"
                )
        if self.draw not in DRAWS:
            raise UserError(
                f"method.draw is {self.draw!r}: it must be one of {', '.join(DRAWS)}"
            )
        if not 0 < self.alpha < float("inf"):
            raise UserError(
                f"method.alpha is {self.alpha}: it must be positive and finite"
            )
        from_pool = self.num_mixes and not self.mixes_records
        if from_pool and self.distinct_pairs and self.pool_size < 2:
            key, what = ("k_base", "views") if uses_views else ("k_diff", "images")
            raise UserError(
                f"method.{key} is {getattr(self, key)}: pairs of distinct {what} need"
                " at least 2; raise it or set method.distinct_pairs to False"
            )

    @property
    def mixes_records(self) -> bool:
        """Whether a clipped term is of a group of records, not of one."""
        return self.name in OF_GROUPS

    def num_groups(self, expected_batch_size: float) -> int | None:
        """G, the groups that a batch is divided into, or None without groups."""
        if not self.mixes_records:
            return None
        return max(1, round(expected_batch_size / self.group_size))

    @property
    def num_views(self) -> int:
        fixed = {"dp_sgd": 1, "pure_dp_mix_diff": 0, "microbatch_mixup": 0}
        return fixed.get(self.name, self.k_base)

    @property
    def num_public(self) -> int:
        return self.k_diff if self.name in WITH_PUBLIC else 0

    @property
    def num_mixes(self) -> int:
        if self.mixes_records:  # every view becomes a mix
            return self.k_base
        return self.k_self if self.name in WITH_MIXES else 0

    @property
    def pool_size(self) -> int:
        """P, the images of which pairs are mixed."""
        return self.num_views + self.num_public

    @property
    def set_size(self) -> int:
        """K, the images that one record brings into the gradient that it enters."""
        return self.pool_size + self.num_mixes


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
    method: MethodConfig,
    augmentation: augment.AugmentationConfig,
    *,
    normalize: Callable[[jax.Array], jax.Array] = lambda images: images,
) -> RecordSet:
    """Returns the function that makes the augmentation set of one record.

    Formal guarantees (of the returned function):
      - The set depends on this record, this key and the public bank alone, for every
        method.
      - With k_self = 0, `dp_mix_self` makes the very set of `self_aug`; `dp_sgd` makes
        the record itself; the views of `dp_mix_diff` are those of `self_aug`.
      - `dp_sgd`, `self_aug` and `dp_mix_self` do not look at the bank, and the other
        methods only at the `k_diff` images that they draw.

    Args:
      method: sizes of the set.
      augmentation: how views are drawn, of the record and of public images alike.
      normalize: brings images of the bank to the scale of the record's image, which has
        been brought there before.

    Raises:
      UserError: for `microbatch_mixup`.

    Returns:
      `f(key, image [H, W, C], label [O], bank=None) -> images [K, H, W, C], labels
      [K, O]`, for one record; use `jax.vmap` for several, over all but the bank. The
      views are first, then public images, then mixes.
    """

    if method.mixes_records:
        raise UserError(
            f"method.name is {method.name!r}: its sets are of groups of records, made"
            " by group_set"
        )

    def public_views(key, image, label, bank) -> Pool:
        draw_key, view_key = jax.random.split(key)
        rows = draw_rows(draw_key, label, bank, method.k_diff, draw=method.draw)
        images, labels = (
            jnp.take(jnp.asarray(array), rows, axis=0, mode="clip")
            for array in (bank.images, bank.labels)
        )
        images = normalize(images)
        if bank.ends.shape[0] != label.shape[0] + 1:
            raise UserError(
                f"public images are of {bank.ends.shape[0] - 1} classes: they must be"
                f" of {label.shape[0]}, as the record's label"
            )
        if (images.shape[1:], images.dtype) != (image.shape, image.dtype):
            raise UserError(
                f"public images are {images.dtype} {images.shape[1:]}: they must be"
                f" {image.dtype} {image.shape} as the record's"
            )
        keys = jax.random.split(view_key, method.k_diff)
        seen = jax.vmap(
            lambda k, drawn: augment.random_view(k, drawn, augmentation=augmentation)
        )(keys, images)
        return seen, jax.nn.one_hot(labels, label.shape[0], dtype=label.dtype)

    def record_set(key, image, label, bank: Bank | None = None) -> Pool:
        # `fold_in` leaves the two keys, and so the sets of the first methods, as they
        # were before there was a bank; by 2, since `split` may fold in 0 and 1.
        (view_key, mix_key), public_key = (
            jax.random.split(key),
            jax.random.fold_in(key, 2),
        )
        if method.name == "dp_sgd":
            return image[None], label[None]
        pool = []
        if method.num_views:
            views = augment.views(
                view_key, image, method.num_views, augmentation=augmentation
            )
            pool.append((views, jnp.broadcast_to(label, (len(views), *label.shape))))
        if method.num_public:
            if bank is None:
                raise UserError(
                    f"method.name is {method.name!r}: its sets draw from a bank of"
                    " public images, which must be given"
                )
            pool.append(public_views(public_key, image, label, bank))
        images, labels = _joined(pool)
        if method.num_mixes == 0:
            return images, labels
        mixed = mixups(
            mix_key,
            images,
            labels,
            method.num_mixes,
            alpha=method.alpha,
            distinct_pairs=method.distinct_pairs,
        )
        return _joined([(images, labels), mixed])

    return record_set


def group_set(
    method: MethodConfig, augmentation: augment.AugmentationConfig
) -> RecordSet:
    """Returns the function that makes the mixed set of one group of records.

    The naive mixup of Zhang et al. (2018) under DP-SGD with microbatches (DP-Mix,
    Section 3): every view of a record is mixed with a view of another record of the
    group, if there is one. The gradient of the whole group is then one term and clipped
    once, so each record touches one term, but owns none: see
    `gradients.with_shared_terms`.

    Formal guarantees (of the returned function):
      - The set depends on the records of this group and their keys alone; what is in
        the place of an absent record does not matter.

    Args:
      method: `k_base`, the views of a record, and `alpha`; a `distinct_pairs` of False
        is not offered, as partners are those of one random rotation for each view.
      augmentation: how views are drawn.

    Returns:
      `f(keys [c], images [c, H, W, C], labels [c, O], bank=None) -> images
      [c k_base, H, W, C], labels [c k_base, O]`. Members come first; a label of zeros
      says that there is none. Labels are scaled by c over the number of members, so
      that the mean over all c k_base images of a loss that is linear in the label, such
      as cross-entropy, is the mean over those of members.
    """

    def mixed_group(keys, images, labels, bank=None) -> Pool:
        del bank
        present = labels.sum(axis=-1) > 0
        count, capacity = present.sum(), present.shape[0]
        images = jnp.where(present[:, None, None, None], images, 0)
        view_keys, weight_keys, partner_keys = jax.vmap(
            lambda key: jax.random.split(key, 3), out_axes=1
        )(keys)
        views = jax.vmap(
            lambda key, image: augment.views(
                key, image, method.k_base, augmentation=augmentation
            )
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


def _joined(parts: Sequence[Pool]) -> Pool:
    images, labels = zip(*parts, strict=True)
    return jnp.concatenate(images), jnp.concatenate(labels)
