"""Prepared TensorFlow Datasets in the array_record format, without TensorFlow.

`python experiments/prepare.py` writes such a folder from any of our own sources;
TensorFlow Datasets itself does from most of its builders, but only with TensorFlow:

    pip install -e ".[tfds-prepare]"
    tfds build cifar10 --file_format=array_record
"""

import functools
import os
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any

from dpmix_jax.data import images
from dpmix_jax.data.cache import Arrays, Listing, decoded
from dpmix_jax.data.folder import divided, stratified
from dpmix_jax.data.records import Records
from dpmix_jax.data.trees import identity
from dpmix_jax.errors import UserError, needing

NAME = re.compile(
    r"tfds:(?P<builder>\w+)(/(?P<config>[\w.-]+))?(:(?P<version>[\d.]+))?"
)
_CHUNK = 256  # examples in one call; one at a time takes twice as long
_INFO = "dataset_info.json"


def builder_of(name: str) -> str | None:
    """Returns the builder in the name of a dataset, None where it is not `tfds:`."""
    match = NAME.fullmatch(name)
    return match["builder"] if match else None


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
    default = pathlib.Path.home() / "tensorflow_datasets"
    given = path or os.environ.get("TFDS_DATA_DIR") or default
    data_dir = pathlib.Path(given).expanduser()
    if (data_dir / _INFO).is_file():
        return data_dir
    # Tfds itself would want its own default config, which ours are prepared without.
    top = data_dir / match["builder"] / (match["config"] or "")
    found = [*top.glob(f"*/{_INFO}"), *top.glob(f"*/*/{_INFO}")]
    versions = [
        info.parent for info in found if match["version"] in (None, info.parent.name)
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
    return max(
        versions, key=lambda version: [*map(int, re.findall(r"\d+", version.name))]
    )


def read(name: str, folder: pathlib.Path, image_size: int) -> Arrays:
    """Reads a prepared dataset, its images through the cache of decoded ones.

    Splits: `train` (with `validation`, where there is a `test` too) and `test`, or else
    `validation`. Without either, the training set is split as `folder` is (EuroSAT).

    Order: by `id` where examples have one (CIFAR: that of the official files), else by
    label and file name where they have those, else that of the folder. Tfds shuffles
    when it prepares; these orders undo it.

    Args:
      name: `tfds:<builder>`.
      folder: what `find_version` returns.
      image_size: 0 for images as they are; else what `images.fit` brings them to.

    Returns:
      Images that are RGB, or grey if all of them are and `image_size` is 0.

    Raises:
      UserError: if the folder cannot be read without TensorFlow, is of another builder,
        or has no images with labels.
    """
    builder = _tfds().builder_from_directory(folder)
    if builder.name != builder_of(name):
        raise UserError(f"it holds {builder.name}, not {name}")
    grey = not image_size and builder.info.features["image"].shape[-1] == 1
    return decoded(
        re.sub(r"\W", "-", name),
        [identity(folder), image_size],
        functools.partial(_listing, builder),
        functools.partial(
            images.decode, image_size=image_size, channels=1 if grey else 3
        ),
    )


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
    with needing("tfds", "prepared datasets need"):
        import tensorflow_datasets
    return tensorflow_datasets


def _listing(builder: Any) -> Listing:
    tfds, features = _tfds(), builder.info.features
    encoded = {  # segmentation masks too
        name: tfds.decode.SkipDecoding()
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
    source = builder.as_data_source(decoders=encoded)
    train, validation, test = (
        [_keyed(*pair) for pair in _examples(source, split)] if split in source else []
        for split in ("train", "validation", "test")
    )
    if test:
        train += validation
    listing = Listing(
        tuple(features["label"].names),
        [example for _, example in sorted(train)],
        [example for _, example in sorted(test or validation)],
        functools.partial(_contents, source),
    )
    return listing if listing.test else divided(listing, stratified)


def _keyed(key: tuple[str, int], example: dict[str, Any]) -> tuple[Any, Any]:
    """Returns what to sort an example by, and its key and label."""
    label = int(example["label"])
    name = example.get("filename", example.get("file_name"))
    order = example.get("id", key if name is None else (label, name))
    return order, (key, label)


def _contents(source: Any, keys: Collection[Any]) -> Iterator[tuple[Any, bytes]]:
    for split in sorted({split for split, _ in keys}):
        rows = sorted(row for other, row in keys if other == split)
        for key, example in _examples(source, split, rows):
            yield key, example["image"]


def _examples(
    source: Any, split: str, rows: Collection[int] | None = None
) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """Yields keys, (split, row), and examples of some rows of a split, or of all."""
    rows = list(range(len(source[split])) if rows is None else rows)
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        for row, example in zip(chunk, source[split].__getitems__(chunk), strict=True):
            yield (split, row), example
