"""Anyone's images from one NumPy archive."""

import pathlib
import zipfile
import zlib

import numpy as np

from dpmix_jax.data.records import Records
from dpmix_jax.errors import UserError

_ARRAYS = (
    "train_images",
    "train_labels",
    "test_images",
    "test_labels",
    "class_names",
)


def load_npz(path: pathlib.Path) -> tuple[Records, Records]:
    """Reads images and labels for training and test, and the names of the classes.

    Args:
      path: of an .npz file with `train_images` and `test_images`, uint8 [N, H, W, C] or
        [N, H, W]; `train_labels` and `test_labels`, integers [N] in [0, O); and
        `class_names`, O strings. (Counting the classes from private labels would let
        one record change the shape of what is released.)

    Returns:
      Training and test records, scaled to [-1, 1].

    Raises:
      UserError: if the file is missing, damaged or lacks an array, or if an array has a
        wrong type or shape.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (
        OSError,
        ValueError,
        EOFError,
        TypeError,
        AttributeError,  # a lone .npy array
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"data.path is {path}: cannot be read ({error})") from None
    for name in _ARRAYS:
        if name not in arrays:
            raise UserError(
                f"data.path is {path}: {name} is missing, it must hold"
                f" {', '.join(_ARRAYS)}"
            )
    for name in ("train_labels", "test_labels"):
        if not np.issubdtype(arrays[name].dtype, np.integer):
            raise UserError(f"{name} in {path} are {arrays[name].dtype}, not integers")
    names = tuple(str(name) for name in np.atleast_1d(arrays["class_names"]))
    train, test = (
        _records(arrays[f"{split}_images"], arrays[f"{split}_labels"], names)
        for split in ("train", "test")
    )
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"training images in {path} are {train.images.shape[1:]}, test images"
            f" {test.images.shape[1:]}: they must be of one size"
        )
    return train, test


def _records(images: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> Records:
    labels = np.clip(labels, -1, len(names))  # or the cast could wrap into range
    images = images[..., None] if images.ndim == 3 else images
    channels = images.shape[-1] if images.ndim == 4 else 1
    return Records(
        images=images,
        labels=labels.astype(np.int32),
        class_names=names,
        mean=(0.5,) * channels,
        stddev=(0.5,) * channels,
    )
