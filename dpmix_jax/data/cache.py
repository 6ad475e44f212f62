"""Images decoded once, kept as uint8 arrays on disk that are mapped into memory.

A cache is `DPMIX_JAX_CACHE/data/<name>-<key>`; the key is a checksum of where the
images come from (paths, sizes and times of change), of `image_size` and of the format
below. It is as private as the images: only its owner may read it.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from dpmix_jax.data.images import BadImageError
from dpmix_jax.errors import UserError
from dpmix_jax.places import cache_folder
from dpmix_jax.progress import duration, say

_VERSION = 1  # of the format, and of how images are decoded
_SPLITS = ("train", "test")
_SECONDS_BETWEEN_LINES = 10.0


class Example(NamedTuple):
    """An image to be decoded: what `Encoded.contents` calls it, and its label."""

    key: Any
    label: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """A dataset that is listed, not yet read.

    Attributes:
      class_names: O names.
      train, test: in the order that the records shall have.
      contents: maps keys to pairs of a key and what `decode` takes, each key once, in
        any order.
      skipped: how many files belong to no split, by reason.
      splits: those that must have images.
    """

    class_names: tuple[str, ...]
    train: list[Example]
    test: list[Example]
    contents: Callable[[Collection[Any]], Iterable[tuple[Any, Any]]]
    skipped: Mapping[str, int]
    splits: tuple[str, ...] = _SPLITS


class Decoded(NamedTuple):
    """Memory-mapped arrays: images uint8 [N, H, W, C] and labels int32 [N], twice."""

    class_names: tuple[str, ...]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    skipped: Mapping[str, int]


def decoded(
    name: str,
    identity: Iterable[Any],
    encoded: Callable[[], Encoded],
    decode: Callable[[Any], np.ndarray],
) -> Decoded:
    """Returns a dataset from its cache, which is made first if there is none.

    A cache appears whole, by one rename; what a killed process has left is removed by
    the next. Of several processes that want the same one, one makes it.

    Args:
      name: of the dataset.
      identity: what changes if the images do.
      encoded: lists the dataset; called only if there is no cache.
      decode: turns content into pixels uint8 [H, W, C], or raises `BadImageError`.

    Raises:
      UserError: if an image cannot be decoded or differs in size from another, or if
        the cache cannot be written.
    """
    key = hashlib.sha256(repr((_VERSION, *identity)).encode()).hexdigest()[:16]
    folder = cache_folder() / "data" / f"{name}-{key}"
    if not folder.exists():
        with _locked(folder):
            if not folder.exists():
                _prepare(name, folder, encoded(), decode)
    return _open(folder)


def owns(images: np.ndarray) -> TypeGuard[np.memmap]:
    """Whether an array is a whole file of a cache, not a part of one or a user's."""
    if not isinstance(images, np.memmap):
        return False
    path = pathlib.Path(str(images.filename))
    inside = (cache_folder() / "data").resolve() in path.resolve().parents
    return inside and path.stat().st_size == images.offset + images.nbytes


def rows(images: np.memmap, indices: np.ndarray) -> np.memmap:
    """Returns rows of an array of a cache as another one, kept beside it.

    So a split of images that do not fit into memory is no more in memory than they are.
    """
    source = pathlib.Path(str(images.filename))
    key = hashlib.sha256(np.ascontiguousarray(indices, np.int64).data).hexdigest()[:16]
    path = source.with_name(f"{source.stem}-{key}.npy")
    if not path.exists():
        with _locked(path), _writing(path):
            partial = path.with_name(f"{path.name}.partial")
            with open(partial, "wb") as file:
                write = _row_writer(file, len(indices), images.shape[1:])
                for row, index in enumerate(indices):
                    write(row, images[index])
                _sync(file)
            os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def _open(folder: pathlib.Path) -> Decoded:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        train, test = (
            (
                np.load(folder / f"{split}_images.npy", mmap_mode="r"),
                np.load(folder / f"{split}_labels.npy"),
            )
            for split in _SPLITS
        )
        return Decoded(tuple(meta["class_names"]), train, test, meta["skipped"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the cache {folder} is damaged, delete it: {error}") from None


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache {path} cannot be written ({error.strerror}): DPMIX_JAX_CACHE"
            " names the folder that holds it"
        ) from None


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Lets one process at a time write `path`; being killed lets go of it."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that writes {path}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prepare(
    name: str,
    folder: pathlib.Path,
    encoded: Encoded,
    decode: Callable[[Any], np.ndarray],
) -> None:
    for split in encoded.splits:
        if not getattr(encoded, split):
            raise UserError(f"{name} has no images for its {split} split")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process: we hold the lock
    try:
        with _writing(folder):
            partial.mkdir(mode=0o700)
            _write_images(name, partial, encoded, decode)
            for split in _SPLITS:
                labels = [example.label for example in getattr(encoded, split)]
                np.save(partial / f"{split}_labels.npy", np.array(labels, np.int32))
            meta = {"class_names": encoded.class_names, "skipped": encoded.skipped}
            (partial / "meta.json").write_text(json.dumps(meta))
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_images(
    name: str,
    folder: pathlib.Path,
    encoded: Encoded,
    decode: Callable[[Any], np.ndarray],
) -> None:
    """Writes the images of both splits, in whatever order they come."""
    places = {
        example.key: (split, row)
        for split in _SPLITS
        for row, example in enumerate(getattr(encoded, split))
    }
    bad: list[str] = []
    first: tuple[Any, tuple[int, ...]] | None = None
    writers: dict[str, Callable[[int, np.ndarray], None]] = {}
    with contextlib.ExitStack() as files:
        for key, result in _progress(name, _decode_all(encoded, places, decode)):
            if isinstance(result, BadImageError):
                bad.append(f"{key}: {result}")
                continue
            if first is None:
                first = key, result.shape
                for split in _SPLITS:
                    path = folder / f"{split}_images.npy"
                    file = files.enter_context(open(path, "wb"))
                    files.callback(_sync, file)
                    count = len(getattr(encoded, split))
                    writers[split] = _row_writer(file, count, result.shape)
            if result.shape != first[1]:
                raise UserError(
                    f"images of {name} differ in size: {first[0]} is {first[1]}, {key}"
                    f" is {result.shape}; set data.image_size to bring all to one size"
                )
            split, row = places.pop(key)
            writers[split](row, result)
    if bad:
        raise UserError(
            f"{len(bad)} images of {name} cannot be decoded, the first is {bad[0]}"
        )
    if places:
        raise UserError(f"{next(iter(places))} of {name} is gone: it was there before")


def _decode_all(
    encoded: Encoded, places: Mapping[Any, Any], decode: Callable[[Any], np.ndarray]
) -> Iterator[tuple[int, Any, Any]]:
    """Yields how many are to come, a key, and its pixels or a `BadImageError`."""

    def attempt(content):
        try:
            return decode(content)
        except BadImageError as error:
            return error

    total, workers = len(places), os.cpu_count() or 1
    waiting: collections.deque = collections.deque()
    contents = iter(encoded.contents(list(places)))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for count in itertools.count():
            # A few ahead of the decoders: enough to keep them busy, not the whole set.
            for key, content in itertools.islice(contents, 4 * workers - len(waiting)):
                waiting.append((key, pool.submit(attempt, content)))
            if not waiting:
                return
            key, future = waiting.popleft()
            yield total - count - 1, key, future.result()


def _progress(
    name: str, results: Iterable[tuple[int, Any, Any]]
) -> Iterator[tuple[Any, Any]]:
    started = said = time.monotonic()
    for count, (left, key, result) in enumerate(results, start=1):
        now = time.monotonic()
        if now - said > _SECONDS_BETWEEN_LINES:
            rate, said = count / (now - started), now
            say(
                f"preparing {name}: {count:,} of {count + left:,} images,"
                f" {rate:.0f}/s, ETA {duration(left / rate)}"
            )
        yield key, result


def _row_writer(
    file: Any, count: int, shape: tuple[int, ...]
) -> Callable[[int, np.ndarray], None]:
    """Begins an .npy file of uint8 [count, *shape]; the result writes one row of it.

    Written, not mapped: so a full disk is an error, and not a signal that kills.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, header)
    start, size = file.tell(), int(np.prod(shape))

    def write(row: int, pixels: np.ndarray) -> None:
        if file.tell() != start + row * size:
            file.seek(start + row * size)
        file.write(np.ascontiguousarray(pixels).data)

    return write


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
