"""Prepared TensorFlow Datasets in the array_record format, without TensorFlow.

`python experiments/prepare.py` writes such a folder from any of our own sources;
TensorFlow Datasets itself does from most of its builders, but only with TensorFlow:

    pip install -e ".[tfds-prepare]"
    tfds build cifar10 --file_format=array_record
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from dpmix_jax.data import images, splits
from dpmix_jax.data.cache import Encoded, Example
from dpmix_jax.data.records import Records
from dpmix_jax.errors import UserError

NAME = re.compile(
    r"tfds:(?P<builder>\w+)(/(?P<config>[\w.-]+))?(:(?P<version>[\d.]+))?"
)
_CHUNK = 256  # examples in one call; one at a time takes twice as long
_INFO = "dataset_info.json"


def find_version(name: str, path: str | None) -> pathlib.Path:
    """Returns the folder of one version of a prepared dataset.

    Args:
      name: `tfds:<builder>[/<config>][:<version>]`; without a version, the latest.
      path: of tfds' data_dir, or of the folder of the version; by default
        `TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.

    Raises:
      UserError: if there is none, or if several configs fit.
    """
    match = NAME.fullmatch(name)
    assert match is not None  # DataConfig has seen to it
    data_dir = pathlib.Path(
        path
        or os.environ.get("TFDS_DATA_DIR")
        or pathlib.Path.home() / "tensorflow_datasets"
    )
    if (data_dir / _INFO).is_file():
        return data_dir
    top = data_dir / match["builder"] / (match["config"] or "")
    versions = [
        info.parent
        for pattern in (f"*/{_INFO}", f"*/*/{_INFO}")
        for info in top.glob(pattern)
        if match["version"] in (None, info.parent.name)
    ]
    if not versions:
        raise UserError(
            f"{name} is not in {top}: see"
            f" https://www.tensorflow.org/datasets/catalog/{match['builder']}, and"
            f" prepare it by `tfds build {name.removeprefix('tfds:')}"
            f" --file_format=array_record --data_dir={data_dir}` (extra tfds-prepare)"
            f" or by `python experiments/prepare.py --tfds_dir={data_dir}`"
        )
    if len({version.parent for version in versions}) > 1:
        configs = sorted({version.parent.name for version in versions})
        raise UserError(
            f"data.name is {name!r}: add one of the configs, {', '.join(configs)}, as"
            f" in tfds:{match['builder']}/{configs[0]}"
        )
    return max(versions, key=lambda version: _numbers(version.name))


def list_examples(folder: pathlib.Path, *, name: str) -> Encoded:
    """Lists a prepared dataset, whose images are then read as encoded bytes.

    Splits: `train` (with `validation`, where there is a `test` too) and `test`, or else
    `validation`. Without either, the training set is split as `folder` is (EuroSAT).

    Order: by `id` where examples have one (CIFAR: that of the official files), else by
    label and file name where they have those, else that of the folder. Tfds shuffles
    when it prepares; these orders undo it.

    Raises:
      UserError: if the folder cannot be read without TensorFlow, is of another builder,
        or has no images with labels.
    """
    builder = _builder(folder, name)
    with _reading(folder):
        source = builder.as_data_source(decoders=_only_bytes(builder))
    found = {
        split: _list_split(source, split, folder, builder.info.features)
        for split in ("train", "validation", "test")
        if split in source
    }
    train, test = found.get("train", []), found.get("test", [])
    if test:
        train = _sorted(train + found.get("validation", []))
    elif not (test := found.get("validation", [])):
        indices = splits.stratified(np.array([e.label for _, e in train], np.int32))
        train, test = ([train[index] for index in part] for part in indices)
    return Encoded(
        class_names=tuple(builder.info.features["label"].names),
        train=[example for _, example in train],
        test=[example for _, example in test],
        contents=lambda keys: _contents(source, keys, folder),
        skipped={},
    )


def channels(folder: pathlib.Path, *, name: str) -> int:
    """Returns 1 if all images of a prepared dataset are grey, else 3."""
    return 1 if _builder(folder, name).info.features["image"].shape[-1] == 1 else 3


def write(name: str, train: Records, test: Records, data_dir: str) -> pathlib.Path:
    """Writes records as a prepared dataset, losslessly; returns its folder.

    `tfds:<name>` then reads it back with the same pixels in the same order.

    Raises:
      UserError: if the extra is missing, or the folder cannot be written.
    """
    tfds: Any = _tfds()

    class Builder(  # type: ignore[call-arg]
        tfds.core.GeneratorBasedBuilder, skip_registration=True
    ):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=train.images.shape[1:]),
                    "label": tfds.features.ClassLabel(names=list(train.class_names)),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {
                split: self._generate_examples(split, records)
                for split, records in (("train", train), ("test", test))
            }

        def _generate_examples(self, split, records):
            for index, label in enumerate(records.labels):
                key = f"{split}_{index:08d}"
                png = images.encode(records.images[index])
                yield key, {"id": key, "image": png, "label": int(label)}

    Builder.name = name
    try:
        builder = Builder(data_dir=data_dir, file_format="array_record")
        if builder.is_prepared():
            raise UserError(f"{builder.data_dir} is there already: delete it first")
        builder.download_and_prepare()
    except OSError as error:
        raise UserError(f"--tfds_dir {data_dir} cannot be written ({error})") from None
    return pathlib.Path(str(builder.data_dir))


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            f'tfds: needs the extra, pip install "dpmix_jax[tfds]" ({error})'
        ) from None
    return tensorflow_datasets


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
    """Turns whatever tfds raises for damaged files into one line; there is no list."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"data.path is {folder}: cannot be read ({reason})") from None


def _builder(folder: pathlib.Path, name: str) -> Any:
    tfds = _tfds()
    with _reading(folder):
        builder = tfds.builder_from_directory(folder)
    match = NAME.fullmatch(name)
    assert match is not None
    if builder.name != match["builder"]:
        raise UserError(f"data.path is {folder}: it holds {builder.name}, not {name}")
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"data.path is {folder}: its format is {builder.info.file_format.value},"
            " prepare it again with --file_format=array_record"
        )
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not features["label"].names:
        raise UserError(
            f"data.path is {folder}: it has {', '.join(features)}, there must be an"
            " image and a label with names"
        )
    return builder


def _only_bytes(builder: Any) -> Any:
    """Returns tfds' decoders that leave images (segmentation masks too) encoded."""
    tfds = _tfds()
    return {
        name: tfds.decode.SkipDecoding()
        for name, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }


def _list_split(
    source: Any, split: str, folder: pathlib.Path, features: Any
) -> list[tuple[Any, Example]]:
    """Returns pairs of what to sort by and an example, sorted."""
    num_classes, found = len(features["label"].names), []
    for key, example in _examples(source, split, range(len(source[split])), folder):
        label = int(example["label"])
        if not 0 <= label < num_classes:
            raise UserError(
                f"data.path is {folder}: label {label} of {split} {key[1]} is not in"
                f" [0, {num_classes})"
            )
        name = example.get("filename", example.get("file_name"))
        order: Any = key
        if "id" in example:
            order = example["id"]
        elif name is not None:
            order = label, name
        found.append((order, Example(key, label)))
    return _sorted(found)


def _sorted(examples: list[tuple[Any, Example]]) -> list[tuple[Any, Example]]:
    return sorted(examples, key=lambda pair: pair[0])


def _contents(
    source: Any, keys: Collection[Any], folder: pathlib.Path
) -> Iterator[tuple[Any, bytes]]:
    for split in sorted({split for split, _ in keys}):
        rows = sorted(row for other, row in keys if other == split)
        for key, example in _examples(source, split, rows, folder):
            yield key, example["image"]


def _examples(
    source: Any, split: str, rows: Collection[int], folder: pathlib.Path
) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    rows = list(rows)
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        with _reading(folder):
            examples = source[split].__getitems__(chunk)
        yield from (((split, row), ex) for row, ex in zip(chunk, examples, strict=True))


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]
