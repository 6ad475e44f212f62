"""Files that are whole or absent, folders that one process holds, and the two folders
of the package: of datasets and of caches.
"""

import contextlib
import errno
import fcntl
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import IO, BinaryIO

from dpmix_jax.errors import UserError
from dpmix_jax.progress import say


def cache_folder() -> pathlib.Path:
    """Returns `DPMIX_JAX_CACHE`, by default `~/.cache/dpmix_jax`."""
    named = os.environ.get("DPMIX_JAX_CACHE")
    return pathlib.Path(named or pathlib.Path.home() / ".cache" / "dpmix_jax")


def data_folder() -> pathlib.Path:
    """Returns `DPMIX_JAX_DATA`, by default `~/dpmix_data`."""
    named = os.environ.get("DPMIX_JAX_DATA")
    return pathlib.Path(named or pathlib.Path.home() / "dpmix_data")


@contextlib.contextmanager
def naming(
    path: pathlib.Path, *, in_place_of: pathlib.Path | None = None
) -> Iterator[None]:
    """Adds the path to an error of the system that has none, as on a full disk.

    Args:
      path: of the file that the user knows.
      in_place_of: of one that the user does not know, whose errors get `path` too.
    """
    try:
        yield
    except OSError as error:
        unknown = error.filename in (None, in_place_of and str(in_place_of))
        if error.errno is not None and unknown:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextlib.contextmanager
def replacing(path: pathlib.Path, *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Opens a new file that replaces `path` once it is written to its end.

    A process that fails or is killed leaves the old file, never a part of the new one.
    """
    if not path.name:  # such as "."
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = path.with_name(f".{path.name}.partial")
    with naming(path, in_place_of=partial):
        partial.unlink(missing_ok=True)  # of a killed process
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_atomically(
    path: pathlib.Path, content: str | bytes, *, mode: int = 0o644
) -> None:
    """Replaces a file by a whole new one: a killed run leaves the old or the new."""
    with replacing(path, mode=mode) as file:
        if isinstance(content, str):  # names of files need not be UTF-8
            content = content.encode(errors="backslashreplace")
        file.write(content)


@contextlib.contextmanager
def locked(
    path: pathlib.Path,
    name: str,
    *,
    wait: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Holds a folder for this process, makes it first; being killed releases it.

    Args:
      path: of the folder.
      name: of the folder, for messages.
      wait: whether to wait for a process that holds it.
      stop: asked while it waits; once true, it waits no longer and raises.

    Raises:
      UserError: that begins with `name`, if the folder cannot be written, or another
        run holds it and `wait` is false.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")  # noqa: SIM115
    except FileExistsError:
        raise UserError(f"{name} is a file: it must be a folder") from None
    except OSError as error:
        raise UserError(f"{name} is not writable: {error.strerror}") from None
    with lock:
        if not _try_lock(lock):
            if wait:
                say(f"waiting for another process that holds {name}")
            # `is_locked` lets go at once.
            until = time.monotonic() + (math.inf if wait else 0.1)
            while not _try_lock(lock):
                if stop() or time.monotonic() > until:
                    raise UserError(f"{name} is in use by another run")
                time.sleep(0.2)
        yield


def is_locked(path: pathlib.Path) -> bool:
    """Whether a process holds a folder."""
    try:
        # Looking at it holds it for an instant, which `locked` allows for.
        with open(path / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none
        return False
    return False


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
