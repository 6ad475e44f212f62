"""Folders, zip and tar archives alike: the names of their files, and their bytes.

Archives are read in memory, member by member: nothing is ever extracted, so no name in
one can make a file appear anywhere.
"""

import abc
import collections
import contextlib
import functools
import hashlib
import os
import pathlib
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator

from dpmix_jax.errors import UserError

# Of one file. The largest that is needed is CIFAR-100's training batch, 155 MB.
MAX_BYTES = 2**28
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_TAR_BLOCK = 512


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Turns whatever a damaged or absent file raises into one line."""
    try:
        yield
    except UserError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,  # an encrypted zip; includes NotImplementedError
        zlib.error,
        zipfile.BadZipFile,
        tarfile.TarError,
    ) as error:
        reason = " ".join(str(error).split())  # tarfile's has several lines
        raise UserError(f"data.path is {path}: cannot be read ({reason})") from None


def _state(found: os.stat_result) -> str:
    """What changes with a file, also where a copy keeps the time of its content."""
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


class Tree(abc.ABC):
    """Files below one root.

    Attributes:
      path: of the folder or archive.
      files: names of the regular files, relative, with `/`, sorted.
      folders: names of the folders, those without files too.
      skipped: how many entries are not in `files`, by reason.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.skipped: collections.Counter[str] = collections.Counter()

    @property
    def files(self) -> list[str]:
        return self._scanned[0]

    @property
    def folders(self) -> set[str]:
        return self._scanned[1]

    @functools.cached_property
    def _scanned(self) -> tuple[list[str], set[str]]:
        files: list[str] = []
        folders: set[str] = set()
        with reading(self.path):
            for name, size in self._entries():
                (folders.add if size is None else files.append)(name)
        for name, count in collections.Counter(files).items():
            if count > 1:
                raise UserError(f"data.path is {self.path}: it holds {name} twice")
        for name in files:
            folders.update(str(p) for p in pathlib.PurePosixPath(name).parents)
        return sorted(files), folders - {"."}

    @abc.abstractmethod
    def identity(self) -> str:
        """Returns what changes if the files do, without reading them."""

    @abc.abstractmethod
    def _entries(self) -> Iterator[tuple[str, int | None]]:
        """Yields names of files with their sizes, and of folders with None."""

    @abc.abstractmethod
    def contents(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Yields each of the named files once, in the order that is quick to read.

        Raises:
          UserError: if one cannot be read.
        """

    def read(self, name: str) -> bytes:
        """Returns the bytes of one file."""
        return next(self.contents([name]))[1]

    def _limited(self, name: str, size: int) -> int:
        if size > MAX_BYTES:
            raise UserError(
                f"data.path is {self.path}: {name} has {size:,} bytes, it must have at"
                f" most {MAX_BYTES:,}"
            )
        return size


class _Folder(Tree):
    """Links to folders are not followed (they may loop), links to files are."""

    def identity(self) -> str:
        content = hashlib.sha256(str(self.path.resolve()).encode())
        with reading(self.path):
            for name in self.files:
                found = (self.path / name).stat()
                content.update(f"{name}\0{_state(found)}\n".encode())
        return content.hexdigest()

    def _entries(self) -> Iterator[tuple[str, int | None]]:
        def refuse(error: OSError):
            raise error

        for folder, subfolders, files in os.walk(self.path, onerror=refuse):
            here = pathlib.Path(folder)
            for name in [*subfolders, *files]:
                if _is_hidden(name):
                    self.skipped["hidden"] += 1
            subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
            links = [name for name in subfolders if (here / name).is_symlink()]
            self.skipped["links to folders"] += len(links)
            subfolders[:] = sorted(set(subfolders) - set(links))
            for name in subfolders:
                yield (here / name).relative_to(self.path).as_posix(), None
            for name in files:
                found = None if _is_hidden(name) else (here / name).stat()
                if found and stat.S_ISREG(found.st_mode):
                    yield (here / name).relative_to(self.path).as_posix(), found.st_size
                elif found:
                    self.skipped["neither files nor folders"] += 1

    def contents(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            with reading(self.path / name), open(self.path / name, "rb") as file:
                self._limited(name, os.fstat(file.fileno()).st_size)
                yield name, file.read(MAX_BYTES + 1)


class _Archive(Tree):
    def identity(self) -> str:
        with reading(self.path):
            found = self.path.stat()
        return f"{self.path.resolve()}\0{_state(found)}"

    def _name(self, name: str) -> str:
        """Returns the name of a member without `./`, if it stays below the root."""
        path = pathlib.PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise UserError(
                f"data.path is {self.path}: its member {name!r} points outside of the"
                " archive"
            )
        return str(path)


class _Zip(_Archive):
    def _members(self, archive: zipfile.ZipFile) -> Iterator[tuple[str, int | None]]:
        for member in archive.infolist():
            name = self._name(member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if _is_hidden(*name.split("/")):
                self.skipped["hidden"] += 1
            elif member.is_dir():
                yield name, None
            elif kind not in (0, stat.S_IFREG):
                self.skipped["neither files nor folders"] += 1
            else:
                yield name, self._limited(name, member.file_size)

    def _entries(self) -> Iterator[tuple[str, int | None]]:
        with zipfile.ZipFile(self.path) as archive:
            yield from self._members(archive)

    def contents(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        wanted = set(names)
        with reading(self.path), zipfile.ZipFile(self.path) as archive:
            for member in archive.infolist():
                name = self._name(member.filename)
                if name in wanted and not member.is_dir():
                    # Never more than was declared; then zipfile compares the checksum.
                    yield name, archive.read(member)


class _Tar(_Archive):
    """Read from start to end: a compressed tar knows no other way."""

    def _entries(self) -> Iterator[tuple[str, int | None]]:
        with tarfile.open(self.path) as archive:
            for member in archive:
                name = self._name(member.name)
                self._limited(name, member.size)
                if _is_hidden(*name.split("/")):
                    self.skipped["hidden"] += 1
                elif member.isdir():
                    yield name, None
                elif not member.isreg():
                    self.skipped["neither files nor folders"] += 1
                else:
                    yield name, member.size
            self._check_end(archive)

    def _check_end(self, archive: tarfile.TarFile) -> None:
        """Raises if the end mark is missing, which tarfile forgives."""
        file = archive.fileobj
        assert file is not None
        file.seek(archive.offset)
        if file.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
            raise EOFError("truncated, or damaged: it has no end mark")
        file.read(2**20)  # the padding, after which gzip compares the checksum

    def contents(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        wanted = set(names)
        with reading(self.path), tarfile.open(self.path) as archive:
            for member in archive:
                name = self._name(member.name)
                if name in wanted and member.isreg():
                    file = archive.extractfile(member)
                    assert file is not None
                    yield name, file.read(self._limited(name, member.size))
                    wanted.remove(name)
                if not wanted:
                    return


def _is_hidden(*parts: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def open_tree(path: pathlib.Path) -> Tree:
    """Returns the files of a folder or of an archive, told apart by its suffix.

    Raises:
      UserError: if it is neither. (Damage shows when the files are listed or read.)
    """
    if path.is_dir():
        return _Folder(path)
    if path.name.endswith(".zip"):
        return _Zip(path)
    if path.name.endswith(ARCHIVES):
        return _Tar(path)
    raise UserError(
        f"data.path is {path}: it must be a folder, or an archive that ends in"
        f" {', '.join(ARCHIVES)}"
    )
