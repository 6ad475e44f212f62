"""Image datasets of the Hugging Face hub: Parquet files, an image and a label a row.

They are read by Arrow alone, from the hub or from a folder of such files. What a file
says of itself, as the names of classes, is what `datasets` has written into it.
"""

import functools
import json
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any

from dpmix_jax.data import images
from dpmix_jax.data.cache import Arrays, Listing, decoded
from dpmix_jax.data.folder import divided, stratified
from dpmix_jax.data.trees import identity
from dpmix_jax.errors import UserError, needing, require

NAME = re.compile(r"hf:(?P<repository>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
# Words in the names of files or folders that tell a split, as the hub reads them.
_SPLITS = {
    "train": "train training",
    "validation": "validation valid val dev",
    "test": "test testing eval evaluation",
}
_WORDS = {word: split for split, words in _SPLITS.items() for word in words.split()}
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
    with needing("hf", "hf: needs"):
        import huggingface_hub as hub
    try:
        return pathlib.Path(
            hub.snapshot_download(
                repository,
                repo_type="dataset",
                allow_patterns="*.parquet",
                local_files_only=not download,
            )
        )
    except Exception as error:  # of the network, too, and each client has its own
        ask = "" if download else "data.download=True fetches it, or "
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.name is 'hf:{repository}': it is not there ({reason}); {ask}give"
            " data.path, a folder of its Parquet files"
        ) from None


def read(name: str, folder: pathlib.Path, image_size: int, columns: str) -> Arrays:
    """Reads the Parquet files of a folder, through the cache of decoded images.

    Splits: `train` (with `validation`, where there is a `test` too) and `test`, or else
    `validation`, by the names of files and folders. Without either, the training set is
    split as `folder` is (EuroSAT). Files are all for training where none names a split.

    Args:
      name: `hf:<repository>`.
      folder: what `find` returns.
      image_size: 0 for images as they are; else what `images.fit` brings them to.
      columns: `<image>,<label>`, or "" where there is one of each kind.

    Returns:
      Images that are RGB, or grey if the files declare them so and `image_size` is 0.
      Nothing that images or labels hold decides it, nor which classes there are.

    Raises:
      UserError: for files without images, or labels with declared classes.
    """
    files = _files(folder)
    features = _features(_parquet().read_schema(next(iter(files))))
    image, label = _columns(features, columns)
    grey = not image_size and features[image].get("mode") == "L"
    return decoded(
        re.sub(r"\W", "-", name),
        [identity(folder), image_size, image, label],
        functools.partial(_listing, files, image, label, features[label]["names"]),
        functools.partial(
            images.decode, image_size=image_size, channels=1 if grey else 3
        ),
    )


def _parquet() -> Any:
    with needing("hf", "hf: needs"):
        import pyarrow.parquet
    return pyarrow.parquet


def _files(folder: pathlib.Path) -> dict[pathlib.Path, str]:
    """Returns the split of each Parquet file below a folder, in their order."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*.parquet")}
    if not paths:
        raise UserError("it has no Parquet files")
    splits = {name: _split(name) for name in sorted(paths)}
    folders = sorted({n.parts[0] for n in splits if len(n.parts) > 1} - {"data"})
    if len(folders) > 1 and not {*folders} <= {*_WORDS}:
        raise UserError(
            f"it has the folders {', '.join(folders)}: name one, as in"
            f" hf:<repository>:{folders[0]}"
        )
    for name, split in splits.items():
        if split is None and any(splits.values()):
            raise UserError(
                f"{name} names none of the splits {', '.join(_SPLITS)}, which others"
                " do: move it away, or rename it"
            )
        _check_whole(name, paths.keys())
    return {paths[name]: split or "train" for name, split in splits.items()}


def _check_whole(name: pathlib.Path, there: Collection[pathlib.Path]) -> None:
    """Raises `UserError` if a file is one of several, and another of them is not there.

    So a download that was cut off is no smaller dataset.
    """
    if numbers := re.search(r"-(\d{5})-of-(\d{5})", name.name):
        for number in range(int(numbers[2])):
            part = numbers[0].replace(numbers[1], f"{number:05}", 1)
            if name.with_name(name.name.replace(numbers[0], part)) not in there:
                raise UserError(f"{name} is there, but not its part {part[1:]}")


def _split(path: pathlib.PurePath) -> str | None:
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((_WORDS[word] for word in words if word in _WORDS), None)


def _columns(features: dict[str, dict], columns: str) -> tuple[str, str]:
    """Returns the columns of images and of labels."""
    kinds = {
        kind: [name for name, x in features.items() if x.get("_type") == kind]
        for kind in ("Image", "ClassLabel")
    }
    names = (
        columns.split(",") if columns else [c[0] for c in kinds.values() if len(c) == 1]
    )
    ok = len(names) == 2 and all(
        n in c for n, c in zip(names, kinds.values(), strict=True)
    )
    have = (f"{kind} columns: {', '.join(c) or 'none'}" for kind, c in kinds.items())
    allowed = f"<image>,<label>; {'; '.join(have)}"
    require(ok, "data.columns", columns, allowed)
    return names[0], names[1]


def _features(schema: Any) -> dict[str, dict]:
    """Returns what `datasets` has declared of the columns, {} for other files."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    found = written.get("info", {}).get("features", {})
    return {name: x for name, x in found.items() if isinstance(x, dict)}


def _listing(
    files: dict[pathlib.Path, str], image: str, label: str, class_names: list[str]
) -> Listing:
    parts: dict[str, list] = {split: [] for split in _SPLITS}
    for path, split in files.items():
        labels = _parquet().read_table(path, columns=[label]).column(0).to_pylist()
        if None in labels:
            raise UserError(f"{path}, row {labels.index(None)}: it has no {label}")
        parts[split] += [((str(path), row), value) for row, value in enumerate(labels)]
    train, validation, test = parts.values()
    if test:
        train += validation
    listing = Listing(
        tuple(class_names),
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
