"""Datasets: one record type, and sources of it by name.

datasets    every dataset by name: its files, its constants; one table
download    where files are looked for; official ones are fetched and verified
arrays      digits, npz, CIFAR, IDX: read into memory
folder      image files, labelled by the folder they are in; banks
tfds        prepared TensorFlow Datasets, read and written without TensorFlow
hf          Parquet files of the Hugging Face hub
rendered    digits drawn from fonts, and clothes
clothes     clothes, shoes and bags drawn from what their names mean
public      images declared public, for DP-Mix_diff
records images cache trees    what those are made of
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from dpmix_jax.data import datasets, hf, images, tfds
from dpmix_jax.data.folder import load_bank
from dpmix_jax.data.records import Records, is_unicode
from dpmix_jax.errors import UserError, require

__all__ = ["DataConfig", "Dataset", "Records", "blank", "load", "load_bank"]

_MAX_IMAGE_SIZE = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which records to train and to test on.

    Attributes:
      name: `digits` (1,437 + 360 handwritten digits of 8x8, embedded in scikit-learn),
        `npz` (arrays of your own, see `arrays.npz`), `folder` (images of your own, a
        folder for each class, see `folder.class_folders`), `cifar10`, `cifar100`,
        `eurosat`, `caltech256`, `sun397`, `oxford_iiit_pet`, `fashion_mnist`, `mnist`
        (their official files), `tfds:<builder>[/<config>][:<version>]` (prepared
        TensorFlow Datasets), or `hf:<repository>[:<config>]` (Parquet files of the
        Hugging Face hub).
      path: of the file or folder, which `npz` and `folder` need. For the others None
        looks below `DPMIX_JAX_DATA`, by default `~/dpmix_data`, for their official
        names; for `tfds:` in `TFDS_DATA_DIR`, by default `~/tensorflow_datasets`; for
        `hf:` in the hub's cache.
      columns: of `hf:`, `<image>,<label>`; "" where there is one of each kind.
      image_size: 0 keeps images as they are, which must then be of one size; else they
        become RGB, their shortest side becomes this (bicubic), and the centre is
        cropped, as CLIP does it.
      resize: 0, or the side that images are brought to on the device, by the same
        bicubic interpolation and crop: small images are stored as they are, enlarged
        for a pretrained encoder when drawn, and then augmented.
      normalization: by the constants of the `dataset`, or those of `clip`, which its
        encoders want.
      half: 0 for all training records, 1 or 2 for one of two disjoint halves of equal
        size, the same for every run. The other may be declared public (DP-Mix, Table
        10).
      validation_size: records taken from the training set (the same for every run) for
        choosing hyperparameters; they are not trained on and, but for a private
        selection, not covered by the guarantee, so what is measured on them is named
        `nonprivate/...`.
      download: whether official files that are missing, where `path` is None, may be
        fetched into `DPMIX_JAX_DATA`, or by the hub into its cache.
    """

    name: str = "digits"
    path: str | None = None
    columns: str = ""
    image_size: int = 0
    resize: int = 0
    normalization: str = "dataset"
    half: int = 0
    validation_size: int = 0
    download: bool = False

    def __post_init__(self):
        of_hub = hf.repository_of(self.name)
        known = self.name in datasets.NAMES or tfds.builder_of(self.name) or of_hub
        own = {"npz": "a file", "folder": "a folder or archive"}.get(self.name)
        names = f"one of {', '.join(datasets.NAMES)}, tfds:<builder> or hf:<repository>"
        require(bool(known), "data.name", self.name, names)
        path, given = self.path, self.path is not None
        if self.name == "digits":
            require(not given, "data.path", path, "None for data.name 'digits'")
        columns, allowed = self.columns, "empty unless data.name is hf:<repository>"
        require(bool(of_hub) or not columns, "data.columns", columns, allowed)
        if own:
            allowed = f"the path of {own} for data.name {self.name!r}"
            require(given, "data.path", path, allowed)
        require(is_unicode(path or ""), "data.path", path, "UTF-8")
        for key in ("image_size", "resize"):
            fits = 0 <= getattr(self, key) <= _MAX_IMAGE_SIZE
            allowed = f"in [0, {_MAX_IMAGE_SIZE}]"
            require(fits, f"data.{key}", getattr(self, key), allowed)
        scale, allowed = self.normalization, "dataset or clip"
        require(scale in ("dataset", "clip"), "data.normalization", scale, allowed)
        halves = "0 for all records, 1 or 2"
        require(self.half in (0, 1, 2), "data.half", self.half, halves)
        size = self.validation_size
        require(size >= 0, "data.validation_size", size, "at least 0")


class Dataset(NamedTuple):
    train: Records
    test: Records
    validation: Records | None


def load(config: DataConfig) -> Dataset:
    """Reads a dataset and splits off the validation records, if asked for.

    Raises:
      UserError: if the data cannot be read, or are too few.
    """
    train, test = datasets.read(
        config.name,
        config.path,
        config.image_size,
        download=config.download,
        columns=config.columns,
    )
    for split, records in (("training", train), ("test", test)):
        if len(records) == 0:
            raise UserError(f"data.name is {config.name!r}: it has no {split} records")
    train = half(_prepared(config, train), config.half)
    test = _prepared(config, test)
    if config.validation_size == 0:
        return Dataset(train, test, None)
    _check_validation(config, len(train))
    order = np.random.default_rng(0).permutation(len(train))  # public: a fixed split
    return Dataset(
        train.subset(order[config.validation_size :]),
        test,
        train.subset(order[: config.validation_size]),
    )


def blank(config: DataConfig) -> Records:
    """Returns black training records, as many as there are and of their shape.

    Files of the user's own, and those of `hf:`, are read for that; of other datasets
    it is known.

    Raises:
      UserError: for what `load` refuses, or a size that is not known.
    """
    known = datasets.blank(config.name, config.image_size)
    if known is None:
        known = load(config).train
        count = len(known)
    else:
        known = _prepared(config, known)
        total = len(known) // 2 if config.half else len(known)
        _check_validation(config, total)
        count = total - config.validation_size
    black = np.broadcast_to(np.uint8(0), (count, *known.images.shape[1:]))
    return dataclasses.replace(known, images=black, labels=np.zeros(count, np.int32))


def half(records: Records, number: int) -> Records:
    """Returns all records (0), or a half of them (1 or 2); an odd one is in neither."""
    if number == 0:
        return records
    size = len(records) // 2
    order = np.random.default_rng(1).permutation(len(records))  # public: fixed
    return records.subset(order[(number - 1) * size : number * size])


def _prepared(config: DataConfig, records: Records) -> Records:
    """Returns records that are resized and normalised as the config says."""
    if config.normalization == "clip":
        channels = records.images.shape[-1]
        if channels != len(images.CLIP_MEAN):
            raise UserError(
                f"data.normalization is 'clip': images of {channels} channel(s) must be"
                " RGB, which data.image_size makes them"
            )
        records = dataclasses.replace(
            records, mean=images.CLIP_MEAN, stddev=images.CLIP_STDDEV
        )
    return dataclasses.replace(records, resize=config.resize)


def _check_validation(config: DataConfig, num_records: int) -> None:
    size, allowed = config.validation_size, f"less than {num_records} training records"
    require(size < num_records, "data.validation_size", size, allowed)
