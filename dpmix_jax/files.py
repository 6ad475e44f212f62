"""Files that are whole or absent, and folders that one process holds."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

from dpmix_jax.errors import UserError


def write_atomically(
    path: pathlib.Path, content: str | bytes, *, mode: int = 0o644
) -> None:
    """Replaces a file by a whole new one: a killed run leaves the old or the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def locked(path: pathlib.Path, name: str) -> Iterator[None]:
    """Holds a folder for this process, makes it first; being killed releases it.

    Raises:
      UserError: that begins with `name`, if the folder cannot be written, or another
        run holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{name} is not writable: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{name} is in use by another run") from None
        yield
