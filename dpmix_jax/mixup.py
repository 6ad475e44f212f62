"""The augmentation set of one record: views, public images, and mixups of pairs.

One record [H, W, C] with soft label [O] becomes K images [K, H, W, C] with soft labels
[K, O]. The gradient of the record is the average over the set, so the set must come
from that record, a key and public data alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dpmix_jax import augment
from dpmix_jax.errors import UserError, require, require_one_of
from dpmix_jax.pool import DRAWS, Pool, draw_rows

# The sizes of each method's set in the paper, (k_base, k_diff, k_self). A method never
# has images of a kind whose size is 0 here.
METHODS = {
    "dp_sgd": (0, 0, 0),
    "self_aug": (16, 0, 0),
    "dp_mix_self": (16, 0, 18),
    "dp_mix_diff": (16, 2, 18),
    "pure_dp_mix_diff": (0, 2, 18),
}

ImageSet = tuple[jax.Array, jax.Array]  # images [K, H, W, C] and soft labels [K, O]
RecordSet = Callable[..., ImageSet]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Which images a record's gradient is averaged over (DP-Mix, Section 3).

    A size that is None takes the method's own in `METHODS`.

    Attributes:
      name: `dp_sgd` (the image itself), `self_aug` (`k_base` views), `dp_mix_self`
        (`k_base` views and `k_self` mixups of pairs of them), `dp_mix_diff` (`k_base`
        views, `k_diff` public images and `k_self` mixups of pairs from both), or
        `pure_dp_mix_diff` (`dp_mix_diff` without views: the set holds no private image,
        but with draws by class it depends on the private label).
      k_base: number of views.
      k_diff: public images drawn for each record and update, flipped and cropped like
        the views.
      k_self: number of mixups.
      draw: of public images: `uniform` over all, or `class` for those of the record's
        class (see `pool.draw_rows` for why that is safe).
      alpha: a mixing weight is drawn from Beta(alpha, alpha).
      distinct_pairs: True: a pair is two different images. False: a pair may be the
        same image twice, and then the mixup is that image.

    Raises:
      UserError: for a value out of its range, or a size that the method does not have.

    Example:
      >>> dpm.MethodConfig(name="dp_mix_diff").set_size  # 16 + 2 + 18
      36
    """

    name: str = "dp_mix_self"
    k_base: int | None = None
    k_diff: int | None = None
    k_self: int | None = None
    draw: str = "uniform"
    alpha: float = 0.2
    distinct_pairs: bool = True

    def __post_init__(self):
        require_one_of("method.name", self.name, METHODS)
        sizes = zip(("k_base", "k_diff", "k_self"), METHODS[self.name], strict=True)
        for key, preset in sizes:
            size = getattr(self, key)
            if size is None:
                object.__setattr__(self, key, preset)
            elif not preset:
                allowed = f"0 for method.name {self.name!r}"
                require(size == 0, f"method.{key}", size, allowed)
            else:
                least = int(key != "k_self")
                require(size >= least, f"method.{key}", size, f"at least {least}")
        require_one_of("method.draw", self.draw, DRAWS)
        finite = 0 < self.alpha < math.inf
        require(finite, "method.alpha", self.alpha, "positive and finite")
        if self.num_mixes and self.distinct_pairs and self.pool_size < 2:
            key, what = ("k_base", "views") if self.k_base else ("k_diff", "images")
            raise UserError(
                f"method.{key} is {getattr(self, key)}: pairs of distinct {what} need"
                " at least 2; raise it or set method.distinct_pairs to False"
            )

    @property
    def num_views(self) -> int:
        """`k_base`. If that is 0: 0 with public images, else 1, the image itself."""
        return self.k_base or int(not self.k_diff)

    @property
    def num_public(self) -> int:
        return self.k_diff or 0

    @property
    def num_mixes(self) -> int:
        return self.k_self or 0

    @property
    def pool_size(self) -> int:
        """P, the images of which pairs are mixed."""
        return self.num_views + self.num_public

    @property
    def set_size(self) -> int:
        """K, the images that a record's gradient is averaged over."""
        return self.pool_size + self.num_mixes


def random_pairs(
    key: jax.Array, pool_size: int, num_pairs: int, *, distinct: bool
) -> tuple[jax.Array, jax.Array]:
    """Draws `num_pairs` ordered pairs of a pool's indices, independent and uniform.

    Args:
      key: scalar key.
      pool_size: P; at least 2 if `distinct`.
      num_pairs: M.
      distinct: uniform over the P(P-1) pairs of different members, else over all P^2.

    Returns:
      Two int32 arrays [M] with values in [0, P).

    Raises:
      UserError: for too small a pool.
    """
    least = 1 + distinct
    require(pool_size >= least, "pool_size", pool_size, f"at least {least}")
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
      labels: [P, O] soft labels, floating-point.
      num_mixes: M.
      alpha: one weight w ~ Beta(alpha, alpha) is drawn for each mix.
      distinct_pairs: see `MethodConfig`.

    Returns:
      [M, H, W, C] images and [M, O] soft labels.

    Raises:
      UserError: if images or labels are not floating-point, if there are not as many
        labels as images, if `alpha` is not positive and finite, or if `distinct_pairs`
        is set and there is only one image.

    Example:
      >>> images, labels = jnp.zeros((4, 28, 28, 1)), jnp.eye(4)
      >>> mix = lambda key: dpm.mixups(key, images, labels, 3, alpha=0.2)
      >>> [array.shape for array in jax.eval_shape(mix, jax.random.key(0))]
      [(3, 28, 28, 1), (3, 4)]
    """
    _check_floating("the images", images, "floating-point")
    _check_floating("labels", labels, "soft, in floating-point")  # or w becomes 0
    as_many = f"{len(images)}, as the images"
    require(len(images) == len(labels), "the number of labels", len(labels), as_many)
    if not isinstance(alpha, jax.core.Tracer):
        require(0 < alpha < math.inf, "alpha", alpha, "positive and finite")
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
      - The set depends on this record, this key and the public pool alone, for every
        method.
      - With k_self = 0, `dp_mix_self` makes the very set of `self_aug`; `dp_sgd` makes
        the record itself; the views of `dp_mix_diff` are those of `self_aug`.
      - `dp_sgd`, `self_aug` and `dp_mix_self` do not look at the pool, and the other
        methods only at the `k_diff` images that they draw.

    Args:
      method: sizes of the set.
      augmentation: how views are drawn, of the record and of public images alike.
      normalize: brings images of the pool to the scale of the record's image. `f`
        does not apply `normalize` to the record's image, which is on that scale
        already.

    Returns:
      `f(key, image [H, W, C], label [O], pool=None) -> images [K, H, W, C], labels
      [K, O]`, for one record; use `jax.vmap` for several, over all but the pool. The
      views are first, then public images, then mixes. `f` raises `UserError` for more
      than one record, for images or labels that are not floating-point, and for a pool
      that is missing or unlike the record.

    Example:
      >>> method = dpm.MethodConfig(name="dp_mix_self", k_base=16, k_self=18)
      >>> record_set = dpm.augmentation_set(method, dpm.AugmentationConfig())
      >>> record = jax.random.key(0), jnp.zeros((32, 32, 3)), jnp.eye(10)[7]
      >>> [array.shape for array in jax.eval_shape(record_set, *record)]
      [(34, 32, 32, 3), (34, 10)]
    """

    def public_views(key, image, label, pool: Pool) -> ImageSet:
        draw_key, view_key = jax.random.split(key)
        rows = draw_rows(draw_key, label, pool, method.num_public, draw=method.draw)
        images, labels = (
            jnp.take(jnp.asarray(array), rows, axis=0, mode="clip")
            for array in (pool.images, pool.labels)
        )
        images = normalize(images)
        if pool.ends.shape[0] != label.shape[0] + 1:
            raise UserError(
                f"public images are of {pool.ends.shape[0] - 1} classes: they must be"
                f" of {label.shape[0]}, as the record's label"
            )
        if (images.shape[1:], images.dtype) != (image.shape, image.dtype):
            raise UserError(
                f"public images are {images.dtype} {images.shape[1:]}: they must be"
                f" {image.dtype} {image.shape} as the record's"
            )
        keys = jax.random.split(view_key, method.num_public)
        view = functools.partial(augment.random_view, augmentation=augmentation)
        views = jax.vmap(view)(keys, images)
        return views, jax.nn.one_hot(labels, label.shape[0], dtype=label.dtype)

    def record_set(key, image, label, pool: Pool | None = None) -> ImageSet:
        _check_one_record(image, label)
        # The key of public images is not part of the split, so that a pool changes no
        # view. It folds in 2, since `split` may fold in 0 and 1.
        view_key, mix_key = jax.random.split(key)
        public_key = jax.random.fold_in(key, 2)
        parts = []
        if method.k_base:
            views = augment.views(
                view_key, image, method.k_base, augmentation=augmentation
            )
            parts.append((views, jnp.broadcast_to(label, (len(views), *label.shape))))
        if method.k_diff:
            if pool is None:
                raise UserError(
                    f"method.name is {method.name!r}: its sets draw from a pool of"
                    " public images, which must be given"
                )
            parts.append(public_views(public_key, image, label, pool))
        if not parts:
            return image[None], label[None]
        if method.k_self:
            mixed = mixups(
                mix_key,
                *_joined(parts),
                method.k_self,
                alpha=method.alpha,
                distinct_pairs=method.distinct_pairs,
            )
            parts.append(mixed)
        return _joined(parts)

    return record_set


def _check_one_record(image: jax.Array, label: jax.Array) -> None:
    if image.ndim != 3 or label.ndim != 1:
        raise UserError(
            f"the record has shapes {image.shape} and {label.shape}: they must be"
            " [H, W, C] and [O] of one record; use jax.vmap for several"
        )
    _check_floating("the image", image, "floating-point, normalise it first")
    _check_floating("the label", label, "soft, in floating-point")


def _check_floating(name: str, array: jax.Array, allowed: str) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{name} is {array.dtype}: it must be {allowed}")


def _joined(parts: Sequence[ImageSet]) -> ImageSet:
    images, labels = zip(*parts, strict=True)
    return jnp.concatenate(images), jnp.concatenate(labels)
