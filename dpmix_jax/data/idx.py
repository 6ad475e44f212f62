"""MNIST's IDX files, plain or compressed (LeCun et al., 1998; Fashion-MNIST too)."""

import gzip
import pathlib
import struct

import numpy as np

from dpmix_jax.data.records import Records
from dpmix_jax.data.trees import reading
from dpmix_jax.errors import UserError

FILES = {
    split: tuple(f"{prefix}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    for split, prefix in (("train", "train"), ("test", "t10k"))
}
_UINT8 = 0x08
_MAX_BYTES = 2**30


def load_idx(
    folder: pathlib.Path,
    *,
    class_names: tuple[str, ...],
    mean: tuple[float, ...],
    stddev: tuple[float, ...],
) -> tuple[Records, Records]:
    """Reads the four files of a folder, each with or without `.gz`.

    Returns:
      Training and test records, images [N, H, W, 1].

    Raises:
      UserError: if a file is missing, damaged, longer or shorter than its header says,
        or if labels do not fit the images.
    """
    splits = []
    for images_name, labels_name in FILES.values():
        images = read_idx(_find(folder, images_name), ndim=3)
        labels = read_idx(_find(folder, labels_name), ndim=1)
        splits.append(
            Records(
                images=images[..., None],
                labels=labels.astype(np.int32),
                class_names=class_names,
                mean=mean,
                stddev=stddev,
            )
        )
    train, test = splits
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"training images in {folder} are {train.images.shape[1:]}, test images"
            f" {test.images.shape[1:]}: they must be of one size"
        )
    return train, test


def read_idx(path: pathlib.Path, *, ndim: int) -> np.ndarray:
    """Reads one file of bytes: two zeros, 0x08, the number of axes, their big-endian
    lengths, the values.

    Raises:
      UserError: for any other content.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with reading(path), opened(path, "rb") as file:
        header = file.read(4 + 4 * ndim)
        if header[:4] != bytes((0, 0, _UINT8, ndim)) or len(header) != 4 + 4 * ndim:
            raise UserError(f"{path} is not an IDX file of bytes with {ndim} axes")
        shape = struct.unpack(f">{ndim}I", header[4:])
        size = int(np.prod(shape, dtype=object))
        if size > _MAX_BYTES:
            raise UserError(f"{path} declares {shape}, more than {_MAX_BYTES:,} bytes")
        values = file.read(size + 1)
    if len(values) != size:
        what = "longer" if len(values) > size else "shorter"
        raise UserError(f"{path} is {what} than the {shape} that it declares")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _find(folder: pathlib.Path, name: str) -> pathlib.Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"data.path is {folder}: {name} or {name}.gz is missing")
