"""Image datasets of the Hugging Face hub: Parquet files, an image and a label a row.

They are read by Arrow alone, from the hub or from a folder of such files. What a file
says of itself, as the names of classes, is what `datasets` has written into it.
"""

import functools
import io
import json
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any

from PIL import Image

from dpmix_jax.data import images
from dpmix_jax.data.cache import Arrays, Listing, decoded
from dpmix_jax.data.folder import divided, stratified
from dpmix_jax.data.trees import identity
from dpmix_jax.errors import UserError, require

NAME = re.compile(r"hf:(?P<repository>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
# Words in the names of files or folders that tell a split, as the hub reads them.
_SPLITS = {
    "train": "train training",
    "validation": "validation valid val dev",
    "test": "test testing eval evaluation",
}
_ROWS = 256  # that are read at a time


def repository_of(name: str) -> str | None:
    """Returns the repository in the name of a dataset, None where it is not `hf:`."""
    match = NAME.fullmatch(name)
    return match["repository"] if match else None


def find(name: str, path: str | None, *, download: bool = False) -> pathlib.Path:
    """Returns the folder of the Parquet files of a dataset.

    Args:
      name: `hf:<repository>[:<config>]`; a config is a folder in the repository.
      path: of the folder; None for what the hub's own cache has of the repository.
      download: whether the hub may be asked for what is not there.

    Raises:
      UserError: if it is not there, or cannot be fetched.
    """
    match = NAME.fullmatch(name)
    assert match is not None  # DataConfig has seen to it
    if path is not None:
        folder = pathlib.Path(path).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"data.path is {path}: it must be a folder of Parquet files"
            )
    else:
        folder = _snapshot(match["repository"], download)
    return folder / match["config"] if match["config"] else folder


def _snapshot(repository: str, download: bool) -> pathlib.Path:
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise UserError(_missing(error)) from None
    try:
        return pathlib.Path(
            hub.snapshot_download(
                repository,
                repo_type="dataset",
                allow_patterns="*.parquet",
                local_files_only=not download,
            )
        )
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        ask = "" if download else "data.download=True fetches it, or "
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.name is 'hf:{repository}': it is not there ({reason}); {ask}give"
            " data.path, a folder of its Parquet files"
        ) from None


def read(name: str, folder: pathlib.Path, image_size: int, columns: str) -> Arrays:
    """Reads the Parquet files of a folder, through the cache of decoded images.

    Splits: `train` (with `validation`, where there is a `test` too) and `test`, or else
    `validation`, by the names of files and folders; a file that names none is for
    training. Without either, the training set is split as `folder` is (EuroSAT).

    Args:
      name: `hf:<repository>`.
      folder: what `find` returns.
      image_size: 0 for images as they are; else what `images.fit` brings them to.
      columns: `<image>,<label>`, or "" where there is one of each kind.

    Returns:
      Images that are RGB, or grey if those that come first in the files are and
      `image_size` is 0.

    Raises:
      UserError: for files without images and labels.
    """
    files = _files(folder)
    first = next(iter(files))
    image, label = _columns(_parquet().read_schema(first), columns)
    grey = not image_size and all(_is_grey(file, image) for file in files)
    return decoded(
        re.sub(r"\W", "-", name),
        [identity(folder), image_size, image, label],
        functools.partial(_listing, files, image, label),
        functools.partial(
            images.decode, image_size=image_size, channels=1 if grey else 3
        ),
    )


def _missing(error: Exception) -> str:
    return f'hf: needs the extra, pip install "dpmix_jax[hf]" ({error})'


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(_missing(error)) from None
    return pyarrow.parquet


def _files(folder: pathlib.Path) -> dict[pathlib.Path, str]:
    """Returns the split of each Parquet file below a folder, in their order."""
    found = {
        path: _split(path.relative_to(folder)) for path in folder.rglob("*.parquet")
    }
    if not found:
        raise UserError("it has no Parquet files")
    configs = sorted({path.relative_to(folder).parts[0] for path in found})
    folders = [name for name in configs if (folder / name).is_dir()]
    if len(folders) > 1 and not {*folders} <= {"data", *_words()}:
        raise UserError(
            f"it has the configs {', '.join(folders)}: name one, as in"
            f" hf:<repository>:{folders[0]}"
        )
    return dict(sorted(found.items()))


def _words() -> dict[str, str]:
    """Returns the split that each word tells."""
    return {word: split for split, words in _SPLITS.items() for word in words.split()}


def _split(path: pathlib.PurePath) -> str:
    known = _words()
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((known[word] for word in words if word in known), "train")


def _columns(schema: Any, columns: str) -> tuple[str, str]:
    """Returns the columns of images and of labels."""
    features = _features(schema)
    kinds = {name: feature.get("_type") for name, feature in features.items()}
    found = [
        [name for name, kind in kinds.items() if kind == wanted]
        for wanted in ("Image", "ClassLabel")
    ]
    names = columns.split(",") if columns else [c[0] for c in found if len(c) == 1]
    have = f"<image>,<label>, two of {', '.join(schema.names)}"
    ok = len(names) == 2 and {*names} <= {*schema.names}
    require(ok, "data.columns", columns, have)
    return names[0], names[1]


def _features(schema: Any) -> dict[str, Any]:
    """Returns what `datasets` has written of the columns, {} for other files."""
    written = (schema.metadata or {}).get(b"huggingface", b"{}")
    return json.loads(written).get("info", {}).get("features", {})


def _listing(files: dict[pathlib.Path, str], image: str, label: str) -> Listing:
    labels = {
        path: _parquet().read_table(path, columns=[label]).column(0).to_pylist()
        for path in files
    }
    names = _features(_parquet().read_schema(next(iter(files)))).get(label, {})
    values = sorted({value for part in labels.values() for value in part})
    class_names = names.get("names") or values
    # Integers are numbers of classes; anything else is the name of one.
    number = {
        value: value if names.get("names") else i for i, value in enumerate(values)
    }
    parts: dict[str, list] = {split: [] for split in _SPLITS}
    for path, split in files.items():
        parts[split] += [
            ((str(path), row), number[value]) for row, value in enumerate(labels[path])
        ]
    train, validation, test = parts.values()
    if test:
        train += validation
    listing = Listing(
        tuple(map(str, class_names)),
        train,
        test or validation,
        functools.partial(_contents, image),
    )
    return listing if listing.test else divided(listing, stratified)


def _contents(image: str, keys: Collection[Any]) -> Iterator[tuple[Any, bytes]]:
    wanted = set(keys)
    for path in sorted({path for path, _ in wanted}):
        for row, content in enumerate(_images(path, image)):
            if (path, row) in wanted:
                if content is None:
                    raise UserError(f"{path}, row {row}: it has no bytes of an image")
                yield (path, row), content


def _images(path: str | pathlib.Path, image: str) -> Iterator[bytes | None]:
    """Yields the bytes of each row: the column is binary, or has a part `bytes`."""
    for batch in _parquet().ParquetFile(path).iter_batches(_ROWS, columns=[image]):
        for value in batch.column(0).to_pylist():
            yield value["bytes"] if isinstance(value, dict) else value


def _is_grey(path: pathlib.Path, image: str) -> bool:
    content = next(_images(path, image), None)
    return content is None or Image.open(io.BytesIO(content)).mode in ("1", "L", "I;16")
