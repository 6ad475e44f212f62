"""Files of datasets: where they are looked for; official ones are fetched on demand.

What is fetched is verified by its checksum, once; what reads it trusts it. Only where
reading fails is a checksum compared again, to say what to do.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from dpmix_jax.errors import UserError
from dpmix_jax.files import data_folder, locked
from dpmix_jax.progress import say

if TYPE_CHECKING:
    from pooch import Pooch

REGISTRY = pathlib.Path(__file__).with_name("official.txt")


def locate(
    name: str,
    parts: Sequence[str],
    path: str | None,
    elsewhere: Sequence[str] = (),
    *,
    download: bool = False,
) -> list[pathlib.Path]:
    """Returns where the parts of a dataset are, each a file, an archive or a folder.

    Args:
      name: of the dataset.
      parts: for each part the names that it may have, separated by spaces; none if it
        is the user's own, of any name. The first that `official.txt` lists is what is
        fetched.
      path: of the folder that holds the parts, or of the only part. None looks into
        `<name>` in `data_folder()`, for an only part into `data_folder()`, then
        elsewhere. (Names such as `images.tar.gz` do not tell of which dataset.)
      elsewhere: folders in which an operating system keeps the parts.
      download: whether parts that are missing may be fetched, where `path` is None.

    Raises:
      UserError: if a part is missing and must not be fetched, or cannot be.
    """
    top = data_folder() / name if path is None else pathlib.Path(path).expanduser()
    others = [] if path else [*map(pathlib.Path, elsewhere)]
    if not path and len(parts) == 1:
        others.insert(0, top.parent)
    for folder in (top, *others):
        found = [_first(folder, names) for names in parts]
        if None not in found:
            return [part for part in found if part is not None]
    if path is not None and len(parts) == 1 and top.exists():
        return [top]
    if not parts[0]:
        raise UserError(f"data.path is {path}: cannot be read (there is no such file)")
    known = official().registry
    missing = [
        next(file for part in names.split() if (file := f"{name}/{part}") in known)
        for names in parts
        if _first(top, names) is None
    ]
    if path is None and download:
        fetch(missing)
        return locate(name, parts, path)
    ask = "data.download=True fetches it, or " if path is None else ""
    raise UserError(
        f"data.path is {path}: {name} is not in {top}; {ask}put {describe(missing)}"
        f" into {top}"
    )


def _first(folder: pathlib.Path, names: str) -> pathlib.Path | None:
    """Returns the first file of a folder that is there."""
    paths = (folder / name for name in names.split())
    return next((path for path in paths if path.exists()), None)


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


def advice(dataset: str, parts: Iterable[pathlib.Path]) -> str:
    """Says which parts that cannot be read are not the official files, if any."""
    from pooch.hashes import hash_matches

    known = official().registry
    wrong = [
        name
        for path in parts
        if (name := f"{dataset}/{path.name}") in known and path.is_file()
        if not hash_matches(str(path), known[name])
    ]
    return f"; not the official file, fetch again {describe(wrong)}" if wrong else ""
