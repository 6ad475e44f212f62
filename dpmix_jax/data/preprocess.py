"""What pretrained encoders expect of images, computed on the device."""

import jax
import jax.numpy as jnp

from dpmix_jax.data.images import placement


def resize_bicubic(images: jax.Array, size: int) -> jax.Array:
    """Resizes and crops images as CLIP does it: `data.images.fit`, on the device.

    So that small images can be stored and augmented as they are, and enlarged for an
    encoder when they are needed. The shortest side becomes `size` by Pillow's bicubic
    interpolation (Keys' with a = -0.5, widened where it shrinks): width first, then
    height, each rounded to integers. Results are within 1 of Pillow's, which computes
    with integers. Then the centre is cropped.

    Args:
      images: uint8 [..., H, W, C].
      size: of the result, in pixels.

    Returns:
      uint8 [..., size, size, C].

    Raises:
      ValueError: for images that are not uint8.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"images are {images.dtype}: they must be uint8")
    *leading, old_height, old_width, channels = images.shape
    width, height, left, top = placement(old_width, old_height, size)
    if width != old_width:
        images = _resize(images, (*leading, old_height, width, channels))
    if height != old_height:
        images = _resize(images, (*leading, height, width, channels))
    return images[..., top : top + size, left : left + size, :]


def _resize(images: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    resized = jax.image.resize(images.astype(jnp.float32), shape, "cubic")
    # Backends differ in what becomes of floats that no uint8 can hold.
    return jnp.clip(jnp.round(resized), 0.0, 255.0).astype(jnp.uint8)
