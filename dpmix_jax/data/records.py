"""The one type of a set of labelled images."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from dpmix_jax.data import cache
from dpmix_jax.data.images import resize_bicubic
from dpmix_jax.errors import UserError


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it, which not every name of a file is."""
    return text == text.encode(errors="replace").decode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
    """Labelled images of one size, undecorated.

    Attributes:
      images: [N, H, W, C] uint8, H and W at least 2, C 1 (grey) or 3 (RGB); a read-only
        memory map where they come from a cache.
      labels: [N] int32 in [0, O).
      class_names: O names that differ, O at least 2.
      mean, stddev: [C] public constants, never computed from private records, on the
        scale where pixels are in [0, 1].
      resize: side that `normalize` brings images to, or 0 for their own.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    stddev: tuple[float, ...]
    resize: int = 0

    def __post_init__(self):
        shape, names = self.images.shape, self.class_names
        whole = self.images.dtype == np.uint8 and len(shape) == 4
        if not (whole and min(shape[1:3]) > 1 and shape[3] in (1, 3)):
            raise UserError(
                f"images are {self.images.dtype} {shape}: they must be uint8"
                " [N, H, W, C] of at least 2x2 pixels, the channels last, 1 or 3 of"
                " them"
            )
        if self.labels.shape != shape[:1]:
            raise UserError(
                f"labels have shape {self.labels.shape}: there must be one for each of"
                f" the {len(self)} images"
            )
        if not 2 <= len({*names}) == len(names):
            raise UserError(
                f"class names are {', '.join(map(repr, names))}: there must be two or"
                " more, which all differ"
            )
        for name in names:
            if not name or not is_unicode(name):
                raise UserError(f"class {name!r}: its name must be UTF-8, not empty")
        if len(self) and not 0 <= self.labels.min() <= self.labels.max() < len(names):
            raise UserError(
                f"labels are in [{self.labels.min()}, {self.labels.max()}]: they must"
                f" be in [0, {len(names)})"
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of normalised images."""
        height, width, channels = self.images.shape[1:]
        if self.resize:
            height = width = self.resize
        return height, width, channels

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(self, indices: np.ndarray) -> "Records":
        """Returns some of the records; of memory-mapped images, another map."""
        rows = np.arange(len(self))[indices]
        if isinstance(self.images, np.memmap) and len(rows):
            images = cache.rows(self.images, rows)
        else:
            images = self.images[rows]
        return dataclasses.replace(self, images=images, labels=self.labels[rows])

    def normalize(self, images: jax.Array) -> jax.Array:
        """Maps uint8 images [..., H, W, C] to float32 by the public constants.

        With `resize`, images become [..., resize, resize, C] first, by
        `images.resize_bicubic`.
        """
        if self.resize:
            images = resize_bicubic(images, self.resize)
        shape = (1,) * (images.ndim - 1) + (-1,)
        mean = jnp.asarray(self.mean, jnp.float32).reshape(shape)
        stddev = jnp.asarray(self.stddev, jnp.float32).reshape(shape)
        return (images.astype(jnp.float32) / 255.0 - mean) / stddev

    def digest(self) -> str:
        """Returns a checksum of everything; as private as the records are."""
        # A map is not copied: images need not fit into memory.
        content = hashlib.sha256(np.ascontiguousarray(self.images).data)
        public = (self.images.shape, self.class_names, self.mean, self.stddev)
        # Not `resize`, which changes no record; the config tells it.
        content.update(repr(public).encode())
        content.update(np.ascontiguousarray(self.labels).data)
        return content.hexdigest()
