"""Views of one image: random flips and shifts, as De et al. (2022) average over.

[H, W, C] -> [k, H, W, C]. Only the image itself and a key enter a view.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dpmix_jax.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """What a view may change.

    Attributes:
      flip: mirror left to right with probability 1/2.
      max_shift: pixels. The image moves by a uniformly random offset in
        [-max_shift, max_shift] along each axis; what moves in is its own reflection.
        With whole offsets this is "reflect-pad by max_shift, then crop" (De et al.,
        2022, Appendix C.1, where it is 4 at 32x32).
      subpixel: draw real offsets and interpolate bilinearly, for images so small that
        a whole pixel is a large move.
    """

    flip: bool = True
    max_shift: float = 4.0
    subpixel: bool = False

    def __post_init__(self):
        shift, key = self.max_shift, "augmentation.max_shift"
        require(0 <= shift < float("inf"), key, shift, "at least 0 and finite")
        whole = "a whole number of pixels, or set augmentation.subpixel"
        require(self.subpixel or shift == int(shift), key, shift, whole)

    def check_images(self, shape: Sequence[int]) -> None:
        """Raises `UserError` if images [H, W, C] are too small for `max_shift`.

        A batch of images is refused too, which would be moved along its records.
        """
        require(len(shape) == 3, "the shape of an image", tuple(shape), "(H, W, C)")
        shift, (height, width) = self.max_shift, shape[:2]
        allowed = f"smaller than the images, which are {height}x{width}"
        fits = shift == 0 or shift < min(height, width)
        require(fits, "augmentation.max_shift", shift, allowed)


def _reflect(index: jax.Array, size: int) -> jax.Array:
    """Folds any integer index into [0, size) as `np.pad(..., mode="reflect")` does."""
    period = max(2 * (size - 1), 1)
    index = index % period
    return jnp.minimum(index, period - index) if size > 1 else index * 0


def _shift(image: jax.Array, offset: jax.Array, axis: int) -> jax.Array:
    """Moves an image along an axis by -`offset` pixels, integer or real."""
    size = image.shape[axis]
    whole = jnp.floor(offset).astype(jnp.int32)
    index = jnp.arange(size, dtype=jnp.int32) + whole
    near = jnp.take(image, _reflect(index, size), axis=axis)
    if jnp.issubdtype(offset.dtype, jnp.integer):
        return near
    far = jnp.take(image, _reflect(index + 1, size), axis=axis)
    fraction = (offset - whole.astype(offset.dtype)).astype(image.dtype)
    return near + fraction * (far - near)


def random_view(
    key: jax.Array, image: jax.Array, *, augmentation: AugmentationConfig
) -> jax.Array:
    """Draws one view of an image.

    Formal guarantees:
      - The view depends on this image and this key alone.

    Args:
      key: scalar key.
      image: [H, W, C] of any dtype; floating-point if `augmentation.subpixel`.
      augmentation: what may change.

    Returns:
      [H, W, C] of the dtype of `image`.

    Raises:
      UserError: for more than one image (use `jax.vmap`), if `augmentation.max_shift`
        is not smaller than the image, or if `augmentation.subpixel` is set and the
        image is not floating-point.
    """
    augmentation.check_images(image.shape)
    floating = jnp.issubdtype(image.dtype, jnp.floating)
    allowed = "floating-point for augmentation.subpixel"
    require(floating or not augmentation.subpixel, "image", image.dtype.name, allowed)
    flip_key, row_key, column_key = jax.random.split(key, 3)
    reach = augmentation.max_shift
    if reach > 0:
        for axis, axis_key in ((0, row_key), (1, column_key)):
            if augmentation.subpixel:
                offset = jax.random.uniform(axis_key, (), jnp.float32, -reach, reach)
            else:
                offset = jax.random.randint(axis_key, (), -int(reach), int(reach) + 1)
            image = _shift(image, offset, axis)
    if augmentation.flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    return image


def views(
    key: jax.Array, image: jax.Array, k: int, *, augmentation: AugmentationConfig
) -> jax.Array:
    """Draws k independent views of one image: [H, W, C] -> [k, H, W, C].

    Formal guarantees:
      - The views depend on this image and this key alone.

    Example:
      >>> image = jnp.zeros((28, 28, 1))
      >>> change = dpm.AugmentationConfig(max_shift=2)
      >>> dpm.views(jax.random.key(0), image, 16, augmentation=change).shape
      (16, 28, 28, 1)
    """
    keys = jax.random.split(key, k)
    return jax.vmap(lambda k: random_view(k, image, augmentation=augmentation))(keys)
