"""Files of a folder, or of a zip or tar archive: their names and their bytes.

Archives are read member by member, in memory: nothing is extracted, so no name in one
can make a file appear anywhere.
"""

import contextlib
import functools
import pathlib
import stat
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from dpmix_jax.errors import UserError
from dpmix_jax.progress import say

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
# A name with `/` between its parts, and how its bytes are read; None for a folder.
_Entry = tuple[str, Callable[[], bytes] | None]


@contextlib.contextmanager
def reading(what: str, advice: Callable[[], str] = str) -> Iterator[None]:
    """Turns whatever reading a file raises into one line that names the file.

    Args:
      what: the beginning of the line, such as `data.path is x.zip`.
      advice: returns the end of the line where the file may be damaged.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except Exception as error:  # damage can make decoders raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what}: cannot be read ({reason}){advice()}") from error


def identity(path: pathlib.Path) -> Any:
    """Returns what changes if a folder or archive does, without reading its files."""
    files = [path]
    if path.is_dir():
        files = [path / name for name in scan(path).files]
    states = ((str(file), file.stat()) for file in files)
    return str(path.resolve()), [
        (name, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        for name, state in states
    ]


class Tree(NamedTuple):
    """The files below a folder, or in an archive, without those that are hidden.

    Attributes:
      path: of the folder or archive.
      files: names of regular files, relative, with `/` between their parts, sorted.
      folders: names of folders, also of those without files.
    """

    path: pathlib.Path
    files: list[str]
    folders: set[str]

    def contents(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Yields each of the named files once, in the order that is quick to read."""
        if self.path.is_dir():
            yield from ((name, (self.path / name).read_bytes()) for name in names)
            return
        wanted = set(names)
        for name, read in _entries(self.path):
            if name in wanted and read:
                yield name, read()
                wanted.remove(name)
            if not wanted:
                return
        raise KeyError(min(wanted))  # it was listed

    def named(self, name: str) -> str:
        """Returns the file whose last part is `name`, or raises `KeyError`."""
        return {file.split("/")[-1]: file for file in self.files}[name]

    def lines(self, name: str) -> list[str]:
        """Returns the lines with text of the file whose last part is `name`."""
        _, content = next(self.contents([self.named(name)]))
        return [line.strip() for line in content.decode().splitlines() if line.strip()]


def scan(path: pathlib.Path) -> Tree:
    """Lists a folder, or an archive, which its suffix tells.

    Raises:
      UserError: if the path is neither.
    """
    if not path.is_dir() and not path.name.endswith(ARCHIVES):
        raise UserError(
            f"it must be a folder, or an archive that ends in {', '.join(ARCHIVES)}"
        )
    entries = dict(_entries(path))
    files = sorted(name for name, read in entries.items() if read)
    folders = {name for name, read in entries.items() if not read}
    for name in files:
        folders.update(map(str, pathlib.PurePosixPath(name).parents))
    return Tree(path, files, folders - {"."})


def _entries(path: pathlib.Path) -> Iterator[_Entry]:
    for name, read in (_walk if path.is_dir() else _members)(path):
        # An absolute name begins with an empty part; `..` is hidden as all with a dot.
        parts = name.rstrip("/").removeprefix("./").split("/")
        if not any(part[:1] in ("", ".") or part == "__MACOSX" for part in parts):
            yield "/".join(parts), read


def _walk(folder: pathlib.Path, above: str = "") -> Iterator[_Entry]:
    for path in folder.iterdir():
        name = above + path.name
        if path.is_dir() and path.is_symlink():
            _tell_of_link(path)
        elif path.is_dir():
            yield name, None
            yield from _walk(path, f"{name}/")
        elif stat.S_ISREG(path.stat().st_mode):  # links to folders may loop
            yield name, path.read_bytes


@functools.cache  # a folder is listed more than once
def _tell_of_link(path: pathlib.Path) -> None:
    if not path.name.startswith("."):  # those are hidden anyway
        say(f"{path} is a link to a folder, and is not followed")


def _members(path: pathlib.Path) -> Iterator[_Entry]:
    """Reads a tar from start to end: if it is compressed, there is no other way."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                read = functools.partial(archive.read, info)
                yield info.filename, None if info.is_dir() else read
        return
    regular = set()
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isreg():
                regular.add(member.name)
            another_name = member.islnk() and member.linkname in regular
            if member.isreg() or another_name or member.isdir():
                read = functools.partial(_read, tar, member)
                yield member.name, None if member.isdir() else read
        file: Any = tar.fileobj
        file.seek(tar.offset)
        # tarfile forgives a missing end; gzip compares its checksum after the padding.
        if file.read(2**20)[:512] != bytes(512):
            raise EOFError("it is cut off")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    return file.read()
