"""Datasets that are arrays, read into memory: digits, `.npz`, CIFAR, and IDX files.

What is of the user's own (`.npz`) is checked. Official files were checked when they
were fetched: what reads them trusts them, and may raise anything if they are damaged.
"""

import gzip
import io
import pathlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import sklearn.datasets
from sklearn.model_selection import train_test_split

from dpmix_jax.data.cache import Arrays
from dpmix_jax.data.trees import scan
from dpmix_jax.errors import UserError

_NPZ = ("train_images", "train_labels", "test_images", "test_labels", "class_names")


def digits() -> Arrays:
    """Returns the handwritten digits that ship with scikit-learn (UCI; Alpaydin and
    Kaynak, 1998): 1,437 training and 360 test images of 8x8, a fixed stratified split.

    Pixels are counts from 0 to 16, stored here as multiples of 15 to fit uint8 (so the
    largest is 240); the constants put them between -1 and 0.88.
    """
    found = sklearn.datasets.load_digits()
    images = (found.images[..., None] * 15).astype(np.uint8)
    labels = found.target.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=labels
    )
    return Arrays(
        tuple(map(str, found.target_names)),
        (images[train], labels[train]),
        (images[test], labels[test]),
    )


def npz(path: pathlib.Path) -> Arrays:
    """Reads images and labels for training and test, and the names of the classes.

    Args:
      path: of an .npz file with `train_images` and `test_images`, uint8 [N, H, W, C] or
        [N, H, W], C 1 or 3; `train_labels` and `test_labels`, integers [N] in [0, O);
        and `class_names`, O strings. (Counting the classes from private labels would
        let one record change the shape of what is released.)

    Raises:
      UserError: if an array is missing, or labels are no integers. (`Records` refuses
        other types, shapes and labels.)
    """
    with open(path, "rb") as file:
        found = np.load(file, allow_pickle=False)
        arrays = dict(found) if isinstance(found, Mapping) else {}  # a lone .npy
    for name in _NPZ:
        if name not in arrays:
            raise UserError(
                f"{name} is missing, it must be an .npz archive of {', '.join(_NPZ)}"
            )
    named = np.atleast_1d(arrays["class_names"])
    if named.ndim > 1:
        raise UserError(f"class_names are {named.shape}, not one for each class")
    if named.dtype.kind == "S":
        named = np.strings.decode(named, "utf-8")
    class_names = tuple(map(str, named))
    splits = []
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"{split}_labels are {labels.dtype}, not integers")
        # What is out of range stays so: a cast alone could wrap it.
        labels = np.clip(labels, -1, len(class_names))
        images = images[..., None] if images.ndim == 3 else images
        splits.append((images, labels.astype(np.int32)))
    return Arrays(class_names, splits[0], splits[1])


def idx(*paths: pathlib.Path) -> Arrays:
    """Reads MNIST's or Fashion-MNIST's four files, compressed or not.

    Args:
      paths: of training images and labels, then of test images and labels.

    Returns:
      Images of [N, H, W, 1], without names of classes.
    """
    train_images, train_labels, test_images, test_labels = map(_idx, paths)
    return Arrays(
        (),
        (train_images[..., None], train_labels.astype(np.int32)),
        (test_images[..., None], test_labels.astype(np.int32)),
    )


def _idx(path: pathlib.Path) -> np.ndarray:
    """Reads two zeros, 8 for uint8, the number of axes, their lengths, the values."""
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        content = file.read()
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} is not an IDX file of bytes")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def cifar10(path: pathlib.Path) -> Arrays:
    """Reads CIFAR-10 (Krizhevsky, 2009), binary or of Python pickles.

    Records are in the order of the files, the same in both.

    Args:
      path: of the official archive, or of the folder that it holds.

    Returns:
      Images of [N, 32, 32, 3], without names of classes.
    """
    train = [f"data_batch_{number}" for number in range(1, 6)]
    return _cifar(path, [train, ["test_batch"]], b"labels", 1)


def cifar100(path: pathlib.Path) -> Arrays:
    """Reads CIFAR-100 with its fine labels; see `cifar10`."""
    return _cifar(path, [["train"], ["test"]], b"fine_labels", 2)


def _cifar(
    path: pathlib.Path, splits: list[list[str]], key: bytes, label_bytes: int
) -> Arrays:
    """Reads both splits.

    Args:
      splits: files of each, which have the suffix `.bin` if they are binary.
      key: of the labels in a pickle.
      label_bytes: before each image of a binary file, of which the last is the label.
    """

    def binary(content: bytes) -> tuple[np.ndarray, np.ndarray]:
        table = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + 3072)
        return table[:, label_bytes:], table[:, label_bytes - 1]

    def pickled(content: bytes) -> tuple[np.ndarray, np.ndarray]:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        return batch[b"data"], np.array(batch[key], np.uint8)

    tree = scan(path)
    is_binary = any(name.endswith(".bin") for name in tree.files)
    read, suffix = (binary, ".bin") if is_binary else (pickled, "")
    arrays = []
    for names in splits:
        files = [tree.named(f"{name}{suffix}") for name in names]
        contents = dict(tree.contents(files))
        parts = [read(contents.pop(file)) for file in files]
        planes, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        arrays.append((np.ascontiguousarray(images), labels.astype(np.int32)))
    return Arrays((), arrays[0], arrays[1])


def _latin1(text: str, encoding: str) -> bytes:
    """Does what Python 3 asks of `_codecs.encode` for bytes in an old protocol."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds NumPy arrays and plain containers, and calls nothing else.

    A pickle of unknown origin under an official name must not run code.
    """

    _reconstruct: Any = np.zeros(0).__reduce__()[0]
    _allowed = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._allowed[module, name]
