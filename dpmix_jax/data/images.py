"""From the bytes of an image file to uint8 pixels, resized as CLIP does it."""

import io
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from dpmix_jax.errors import UserError

_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")  # none runs a program
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".gif", ".bmp"),
    *(".ppm", ".pgm", ".tif", ".tiff", ".webp"),
)
# Mean and standard deviation of each channel, for pixels in [0, 1], of OpenAI's CLIP
# and open_clip: for photographs and pretrained encoders.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STDDEV = (0.26862954, 0.26130258, 0.27577711)
_MAX_PIXELS = 2**26  # 67 million, before and after resizing; a photograph has 50


def decode(content: bytes, *, image_size: int = 0, channels: int = 3) -> np.ndarray:
    """Decodes one image file.

    Everything becomes RGB as Pillow converts it: grey is repeated, palettes are looked
    up, CMYK is converted without a colour profile, transparency is dropped; of 16-bit
    grey the high byte is kept. The orientation in EXIF data is ignored, as torchvision
    does.

    Args:
      content: of the file: JPEG, PNG, GIF (its first frame), BMP, PPM, TIFF or WebP.
      image_size: 0 keeps the size; else see `fit`.
      channels: 3, or 1 for grey.

    Returns:
      uint8 [H, W, channels].

    Raises:
      Exception: of any type, if it is truncated, damaged, of another format, or too
        large; the message says why, not which.
    """
    with _opened(content) as image:
        _check_size(*image.size)
        pixels = fit(_converted(image, "RGB" if channels == 3 else "L"), image_size)
    return pixels.reshape(*pixels.shape[:2], channels)


def size(content: bytes, name: str) -> tuple[int, int]:
    """Returns the width and height of an image file, without decoding it.

    Raises:
      UserError: naming the file, if it is none.
    """
    try:
        with _opened(content) as image:
            return image.size
    except Exception as error:  # damage can make decoders raise anything
        raise UserError(f"{name} cannot be read: {error}") from None


def _opened(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:
        formats = ", ".join(_FORMATS)
        raise ValueError(f"its {len(content)} bytes are none of {formats}") from None


def fit(image: Image.Image, image_size: int) -> np.ndarray:
    """Returns the pixels of an image, resized and cropped as CLIP does it.

    The shortest side becomes `image_size` by bicubic interpolation, the longest is
    rounded down; then the centre is cropped. 0 returns the pixels as they are.
    """
    if image_size == 0:
        return np.asarray(image, np.uint8)
    width, height, left, top = placement(*image.size, image_size)
    _check_size(width, height)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(
        image.crop((left, top, left + image_size, top + image_size)), np.uint8
    )


def placement(width: int, height: int, image_size: int) -> tuple[int, int, int, int]:
    """Returns the size to resize to, and where the crop of `fit` begins in it.

    Args:
      width, height: of an image.
      image_size: that its shortest side becomes.

    Returns:
      Width and height after resizing; left and top of the crop.
    """
    shortest = min(width, height)
    width, height = (int(image_size * side / shortest) for side in (width, height))
    left, top = (round((side - image_size) / 2.0) for side in (width, height))
    return width, height, left, top


def resize_bicubic(images: jax.Array, size: int) -> jax.Array:
    """Resizes and crops images as CLIP does it: `fit`, on the device.

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


def encode(pixels: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """Encodes uint8 [H, W, 1 or 3] as PNG, with pieces of text by keyword."""
    file, info = io.BytesIO(), PngImagePlugin.PngInfo()
    for keyword, value in (text or {}).items():
        info.add_text(keyword, value)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
        file, "PNG", pnginfo=info
    )
    return file.getvalue()


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}, not of 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return image.convert(mode)


def _check_size(width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise ValueError(f"{width}x{height} are more than {_MAX_PIXELS:,} pixels")


def _resize(images: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    resized = jax.image.resize(images.astype(jnp.float32), shape, "cubic")
    # Backends differ in what becomes of floats that no uint8 can hold.
    return jnp.clip(jnp.round(resized), 0.0, 255.0).astype(jnp.uint8)
