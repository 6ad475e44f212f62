"""Images decoded once, kept as uint8 arrays on disk that are mapped into memory.

A cache is the folder `DPMIX_JAX_CACHE/data/<name>-<key>`. The key is a checksum of
where the images come from (paths, sizes and times of change), of `image_size` and of
the format below. `meta.json` is written last: a folder without it is not finished, and
is filled by the next process that needs it. A cache is as private as its images: only
its owner may read it.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable
from typing import Any, NamedTuple

import numpy as np

from dpmix_jax.errors import UserError
from dpmix_jax.files import cache_folder, locked, replacing, write_atomically
from dpmix_jax.progress import bar

_VERSION = 3  # of the format, and of how images are decoded
_META, _IMAGES = "meta.json", "images.uint8"


class Listing(NamedTuple):
    """A dataset that is listed, not yet read.

    Attributes:
      class_names: O names.
      train, test: pairs of a key and a label, in the order of the records.
      contents: maps keys to pairs of a key and what is decoded, each key once, in any
        order.
    """

    class_names: tuple[str, ...]
    train: list[tuple[Any, int]]
    test: list[tuple[Any, int]]
    contents: Callable[[Collection[Any]], Iterable[tuple[Any, Any]]]


class Arrays(NamedTuple):
    """A dataset that is read: images uint8 [N, H, W, C] and labels int32 [N], twice."""

    class_names: tuple[str, ...]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def decoded(
    name: str,
    identity: Iterable[Any],
    listing: Callable[[], Listing],
    decode: Callable[[Any], np.ndarray],
) -> Arrays:
    """Returns a dataset from its cache, which is filled first if it is not.

    Of several processes that want the same one, one fills it.

    Args:
      name: of the dataset.
      identity: what changes if the images do.
      listing: lists the dataset; called only if there is no cache.
      decode: turns content into pixels uint8 [H, W, C], or raises anything.

    Raises:
      UserError: if there are no images, if one cannot be decoded or differs in size
        from another, or if the cache cannot be written.
    """
    key = hashlib.sha256(repr((_VERSION, *identity)).encode()).hexdigest()[:16]
    folder = cache_folder() / "data" / f"{name}-{key}"
    if not (folder / _META).exists():
        with locked(folder, f"the cache {folder}, below DPMIX_JAX_CACHE,", wait=True):
            if not (folder / _META).exists():
                _fill(name, folder, listing(), decode)
    try:
        meta = json.loads((folder / _META).read_text())
        labels, count = np.array(meta["labels"], np.int32), meta["train"]
        shape = (len(labels), *meta["shape"])
        images = np.memmap(folder / _IMAGES, np.uint8, "r", shape=shape)
        return Arrays(
            tuple(meta["class_names"]),
            (images[:count], labels[:count]),
            (images[count:], labels[count:]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the cache {folder} is damaged, delete it: {error}") from None


def rows(images: np.memmap, indices: np.ndarray) -> np.ndarray:
    """Returns rows of a mapped array as another one, in a file without a name.

    So a subset of mapped images stays on the disk too.
    The file is gone with the last array that uses it.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for index in indices:
                file.write(np.ascontiguousarray(images[index]).data)
            file.flush()
            shape = (len(indices), *images.shape[1:])
            return np.memmap(file, images.dtype, "r", shape=shape)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: pathlib.Path, error: OSError) -> UserError:
    return UserError(
        f"the cache {folder} cannot be written ({error.strerror}): DPMIX_JAX_CACHE"
        " names the folder that holds it"
    )


def _fill(
    name: str,
    folder: pathlib.Path,
    listing: Listing,
    decode: Callable[[Any], np.ndarray],
) -> None:
    """Writes the images in whatever order they come, training before test images."""
    folder.chmod(0o700)
    examples = [*listing.train, *listing.test]
    row_of = {key: row for row, (key, _) in enumerate(examples)}
    decoded = contextlib.closing(_decode_all(listing.contents(list(row_of)), decode))
    shown = {"desc": f"preparing {name}", "total": len(examples)}
    bad, first, shape = [], None, None
    with decoded as found, replacing(folder / _IMAGES, mode=0o600) as file:
        for key, pixels in bar(found, **shown):
            if isinstance(pixels, Exception):
                bad.append(f"{key} ({str(pixels) or type(pixels).__name__})")
                continue
            if shape is None:
                first, shape = key, pixels.shape
            if pixels.shape != shape:
                raise UserError(
                    f"images differ in size: {first} is {shape}, {key} is"
                    f" {pixels.shape}; set data.image_size to bring all to one size"
                )
            try:  # written, not mapped: a full disk raises, and kills nobody
                file.seek(row_of[key] * pixels.nbytes)
                file.write(np.ascontiguousarray(pixels).data)
            except OSError as error:
                raise _unwritable(folder, error) from None
        if bad:
            raise UserError(f"{len(bad)} images cannot be decoded, such as {bad[0]}")
    if shape is None:
        raise UserError(f"{name} has no images")
    meta = {
        "class_names": listing.class_names,
        "shape": shape,
        "labels": [int(label) for _, label in examples],
        "train": len(listing.train),
    }
    write_atomically(folder / _META, json.dumps(meta), mode=0o600)


def _decode_all(
    contents: Iterable[tuple[Any, Any]], decode: Callable[[Any], np.ndarray]
) -> Generator[tuple[Any, np.ndarray | Exception], None, None]:
    """Yields keys with pixels or why there are none; decodes a batch at a time."""

    def attempt(content):
        try:
            return decode(content)
        except Exception as error:  # decoders raise whatever damage makes them
            return error

    workers, contents = os.cpu_count() or 1, iter(contents)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        while batch := list(itertools.islice(contents, 32 * workers)):
            keys, encoded = zip(*batch, strict=True)
            yield from zip(keys, pool.map(attempt, encoded), strict=True)
