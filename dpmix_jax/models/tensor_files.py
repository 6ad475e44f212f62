"""Arrays by name from files that others wrote: safetensors, or PyTorch's `torch.save`.

PyTorch is not needed, and no code in a file is ever run: a pickle that asks for
anything but tensors and dictionaries is refused.
"""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from dpmix_jax.errors import UserError

_SAFETENSORS = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "I8": "int8",
    "U8": "uint8",
}
_STORAGES = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ShortStorage": "int16",
}


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file that is open.

    Attributes:
      shape: of the array.
      dtype: of its values.
      read: returns it, or raises `UserError` if it is damaged.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@contextlib.contextmanager
def open_arrays(path: pathlib.Path) -> Iterator[dict[str, StoredArray]]:
    """Opens a file of named arrays, of which none is read yet.

    Args:
      path: a safetensors file, or one of PyTorch's (since 1.6) with a state dict, also
        under the key `state_dict` of a checkpoint.

    Raises:
      UserError: if it is of neither format, truncated or damaged, or if its pickle asks
        for anything but tensors and dictionaries.
    """
    with contextlib.ExitStack() as files:
        with _readable(path):
            with open(path, "rb") as file:
                start = file.read(9)
            if start.startswith(b"PK"):
                arrays = _open_torch(path, files)
            elif start[8:] == b"{":
                arrays = _open_safetensors(path, files)
            else:
                old = start[:1] == b"\x80"  # a bare pickle
                raise UserError(
                    f"weights are {path}: it must be a safetensors file or one that"
                    f" torch.save wrote{' since PyTorch 1.6, not before' * old}"
                )
            if not all(key.isprintable() for key in arrays):  # errors name them
                raise ValueError("a key is not printable")
        yield arrays


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damage makes decoders raise whatever they like
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"weights are {path}: it must be a whole file, not a truncated or damaged"
            f" one ({reason})"
        ) from None


def _open_safetensors(
    path: pathlib.Path, files: contextlib.ExitStack
) -> dict[str, StoredArray]:
    file = files.enter_context(safetensors.safe_open(path, "numpy"))

    def read(key: str) -> np.ndarray:
        with _readable(path):
            return file.get_tensor(key)

    arrays = {}
    for key in file.keys():  # noqa: SIM118, it is no dictionary
        entry = file.get_slice(key)
        stored = _SAFETENSORS.get(entry.get_dtype())
        if stored is None:
            raise UserError(
                f"weights are {path}: {key} is {entry.get_dtype()}, it must be one of"
                f" {', '.join(_SAFETENSORS)}"
            )
        shape, dtype = tuple(entry.get_shape()), jnp.dtype(stored)
        arrays[key] = StoredArray(shape, dtype, functools.partial(read, key))
    return arrays


class _Storage(NamedTuple):
    """Numbers in an entry of the archive."""

    dtype: str
    entry: str
    length: int


class _Tensor(NamedTuple):
    """A view of a storage, as PyTorch describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def valid(self) -> bool:
        """Whether all of it lies within its storage."""
        numbers = (self.offset, *self.shape, *self.strides)
        if (
            not isinstance(self.storage, _Storage)
            or len(self.shape) != len(self.strides)
            or not all(type(number) is int and number >= 0 for number in numbers)
        ):
            return False
        if 0 in self.shape:
            return True
        sides = zip(self.shape, self.strides, strict=True)
        last = self.offset + sum((side - 1) * stride for side, stride in sides)
        return last < self.storage.length


class _Unpickler(pickle.Unpickler):
    """Reads tensors in dictionaries; refuses the names of all else before any call."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _STORAGES:
            return name
        raise UserError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        _, storage, entry, _, count = pid
        return _Storage(_STORAGES[storage], entry, count)


def _rebuild(storage, offset, shape, strides, *_) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _open_torch(
    path: pathlib.Path, files: contextlib.ExitStack
) -> dict[str, StoredArray]:
    archive = files.enter_context(zipfile.ZipFile(path))
    names = set(archive.namelist())
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1 or any("/code/" in name for name in names):
        raise UserError(
            f"weights are {path}: it must be a state dict that torch.save wrote, not"
            " a TorchScript program or another archive"
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise UserError(f"weights are {path}: its numbers must be little-endian")
    return {
        key: StoredArray(
            tensor.shape,
            jnp.dtype(tensor.storage.dtype),
            functools.partial(_read_torch, path, archive, root, tensor),
        )
        for key, tensor in _state_dict(path, archive, pickles[0]).items()
    }


def _state_dict(
    path: pathlib.Path, archive: zipfile.ZipFile, name: str
) -> dict[str, _Tensor]:
    try:
        with archive.open(name) as file:
            content = _Unpickler(file).load()
    except UserError as error:
        raise UserError(
            f"weights are {path}: it must be a state dict of tensors only, but {error};"
            " nothing of it was run"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UserError(
            f"weights are {path}: it must be a state dict, not a"
            f" {type(content).__name__.strip('_').lower()}"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, _Tensor):
            raise UserError(
                f"weights are {path}: its entry {key!r} must be a tensor, not"
                f" {type(value).__name__}"
            )
        if not value.valid():
            raise ValueError(f"{key} is not within its storage")
    return content


def _read_torch(
    path: pathlib.Path, archive: zipfile.ZipFile, root: str, tensor: _Tensor
) -> np.ndarray:
    storage, dtype = tensor.storage, jnp.dtype(tensor.storage.dtype)
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, dtype)
    with _readable(path):
        entry = archive.getinfo(f"{root}data/{storage.entry}")
        if entry.file_size != storage.length * dtype.itemsize:
            raise ValueError(f"{entry.filename} does not hold {storage.length} {dtype}")
        content = archive.read(entry)  # checks its CRC
        values = np.frombuffer(content, dtype)[tensor.offset :]
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(values, tensor.shape, strides)
