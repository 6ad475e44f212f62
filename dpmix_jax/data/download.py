"""Files of datasets: where they are looked for; official ones are fetched on demand.

What is fetched is verified by its checksum, once; what reads it trusts it. Only where
reading fails is a checksum compared again, to say what to do.
"""

import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from dpmix_jax.errors import UserError
from dpmix_jax.files import data_folder, locked
from dpmix_jax.progress import say

if TYPE_CHECKING:
    from pooch import Pooch

REGISTRY = pathlib.Path(__file__).with_name("official.txt")


class Files(NamedTuple):
    """Where the parts of a dataset are, each of them a file, an archive or a folder.

    Attributes:
      parts: for each part the names that it has when it is fetched or unpacked; none if
        it is the user's own, of any name. The first that `official.txt` lists is what
        is fetched.
      folder: that the parts lie in when they are unpacked.
      elsewhere: folders in which an operating system keeps them.
    """

    parts: tuple[tuple[str, ...], ...] = ((),)
    folder: str = ""
    elsewhere: tuple[str, ...] = ()

    @classmethod
    def of_one_part(cls, *names: str) -> "Files":
        return cls(parts=(names,))


def locate(
    name: str, files: Files, path: str | None, *, download: bool = False
) -> list[pathlib.Path]:
    """Returns where the parts of a dataset are.

    They have their official names below `path`, or by default below `data_folder()`;
    a dataset of one part may be `path` itself.

    Raises:
      UserError: if a part is missing and must not be fetched, or cannot be.
    """
    if path is None:
        top = data_folder() / name
        tops = [top, top / files.folder, data_folder() / files.folder]
        tops += map(pathlib.Path, files.elsewhere)
    else:
        top = pathlib.Path(path).expanduser()
        tops = [top, top / files.folder]
    for parts in ([_first(t, names) for names in files.parts] for t in tops):
        if None not in parts:
            return [part for part in parts if part is not None]
    if path is not None and len(files.parts) == 1 and top.exists():
        return [top]
    if not files.parts[0]:
        raise UserError(f"data.path is {path}: cannot be read (there is no such file)")
    known = official().registry
    missing = [
        next(file for part in names if (file := f"{name}/{part}") in known)
        for names in files.parts
        if _first(top, names) is None
    ]
    if path is None and download:
        fetch(missing)
        return locate(name, files, path)
    where = " or ".join([str(top), *(files.elsewhere if path is None else ())])
    ask = "data.download=True fetches it, or " if path is None else ""
    raise UserError(
        f"data.path is {path}: {name} is not in {where}; {ask}put {describe(missing)}"
        f" into {top}"
    )


def _first(folder: pathlib.Path, names: Iterable[str]) -> pathlib.Path | None:
    """Returns the first file of a folder that is there."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def official() -> "Pooch":
    """Returns checksums and addresses of files, by `<dataset>/<file>`."""
    import pooch  # takes a while, and a run whose data are there does not need it

    pooch.get_logger().setLevel("WARNING")
    files = pooch.create(path=data_folder(), base_url="")
    files.load_registry(REGISTRY)
    return files


def fetch(names: Iterable[str]) -> None:
    """Fetches those files, `<dataset>/<file>`, that `data_folder()` lacks.

    A file appears when it is whole and its checksum is the official one. What is
    fetched is told, and how far it is.

    Raises:
      UserError: if a file cannot be fetched or written, or has another checksum.
    """
    from pooch import HTTPDownloader

    for name in names:
        path = data_folder() / name
        try:
            with locked(path.parent, f"data folder {path.parent}", wait=True):
                if path.exists():
                    continue
                say(f"fetching {describe([name])} into {path.parent}")
                # One byte, until the server tells how many there are.
                with tqdm(total=1, unit="B", unit_scale=True, mininterval=1.0) as bar:
                    get = HTTPDownloader(progressbar=bar, chunk_size=2**20)
                    official().fetch(name, downloader=get)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path.name} cannot be fetched ({reason}): put {describe([name])}"
                f" into {path.parent}"
            ) from None


def describe(names: Iterable[str]) -> str:
    """Says what files must be, and where they are published."""
    files = official()
    return ", ".join(
        f"{name.split('/')[-1]} ({files.registry[name]}) from {files.get_url(name)}"
        for name in names
    )


def compare(dataset: str, parts: Iterable[pathlib.Path]) -> str:
    """Says of parts that cannot be read whether they are the official files."""
    import pooch

    files, said = official(), ""
    for path in parts:
        name = f"{dataset}/{path.name}"
        if name in files.registry and path.is_file():
            kind = files.registry[name].split(":")[0]
            own = f"{kind}:{pooch.file_hash(str(path), alg=kind)}"
            said += f"; {path.name} is the official file, by its checksum {own}"
            if own != files.registry[name]:
                said = f"; {path.name} has the checksum {own}: fetch again"
                said += f" {describe([name])}"
    return said
