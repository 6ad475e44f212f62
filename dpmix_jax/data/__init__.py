"""Datasets: one record type, and sources of it by name.

sources     every dataset by name: where it is, its page, its constants
public      images declared public, for DP-Mix_diff
digits npz idx cifar    files that are arrays, read into memory
folder      files that are images, labelled by where they are; official layouts
bank        banks: public images in class folders, all of them one set
tfds        prepared TensorFlow Datasets, read and written without TensorFlow
trees images splits cache    what those are made of
preprocess  resizing on the device
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from dpmix_jax.data import images, sources, tfds
from dpmix_jax.data.bank import load_bank
from dpmix_jax.data.records import Records
from dpmix_jax.errors import UserError

__all__ = ["DataConfig", "Dataset", "Records", "blank", "load", "load_bank"]

_MAX_IMAGE_SIZE = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which records to train and to test on.

    Attributes:
      name: `digits` (1,437 + 360 handwritten digits of 8x8, embedded in scikit-learn),
        `npz` (arrays of your own, see `data.npz`), `folder` (images of your own, a
        folder for each class, see `data.folder`), `cifar10`, `cifar100`, `eurosat`,
        `caltech256`, `sun397`, `oxford_iiit_pet`, `fashion_mnist`, `mnist` (their
        official files), or `tfds:<builder>[/<config>][:<version>]` (prepared
        TensorFlow Datasets).
      path: of the file or folder, which `npz` and `folder` need. For the others None
        looks below `DPMIX_JAX_DATA`, by default `~/dpmix_data`, for their official
        names; for `tfds:` in `TFDS_DATA_DIR`, by default `~/tensorflow_datasets`.
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
    """

    name: str = "digits"
    path: str | None = None
    image_size: int = 0
    resize: int = 0
    normalization: str = "dataset"
    half: int = 0
    validation_size: int = 0

    def __post_init__(self):
        if self.name not in sources.NAMES and not tfds.NAME.fullmatch(self.name):
            raise UserError(
                f"data.name is {self.name!r}: it must be one of"
                f" {', '.join(sources.NAMES)}, or tfds:<builder>"
            )
        if self.name == "digits" and self.path is not None:
            raise UserError(
                f"data.path is {self.path}: it must be None for data.name 'digits'"
            )
        if self.name in ("npz", "folder") and self.path is None:
            what = {"npz": "a file", "folder": "a folder or archive"}[self.name]
            raise UserError(
                f"data.path is None: it must be the path of {what} for data.name"
                f" {self.name!r}"
            )
        if not 0 <= self.image_size <= _MAX_IMAGE_SIZE:
            raise UserError(
                f"data.image_size is {self.image_size}: it must be in"
                f" [0, {_MAX_IMAGE_SIZE}]"
            )
        if not 0 <= self.resize <= _MAX_IMAGE_SIZE:
            raise UserError(
                f"data.resize is {self.resize}: it must be in [0, {_MAX_IMAGE_SIZE}]"
            )
        if self.normalization not in ("dataset", "clip"):
            raise UserError(
                f"data.normalization is {self.normalization!r}: it must be dataset or"
                " clip"
            )
        if self.half not in (0, 1, 2):
            raise UserError(
                f"data.half is {self.half}: it must be 0 for all records, 1 or 2"
            )
        if self.validation_size < 0:
            raise UserError(
                f"data.validation_size is {self.validation_size}: it must be at least 0"
            )


class Dataset(NamedTuple):
    train: Records
    test: Records
    validation: Records | None


def blank(config: DataConfig) -> Records:
    """Returns black training records, as many as there are and of their shape.

    Files of the user's own are read for that; of other datasets it is known.

    Raises:
      UserError: for what `load` refuses, or a size that is not known.
    """
    known = sources.blank(config.name, config.image_size)
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


def load(config: DataConfig) -> Dataset:
    """Reads a dataset and splits off the validation records, if asked for.

    Raises:
      UserError: if the data cannot be read, or are too few.
    """
    train, test = (
        _prepared(config, records)
        for records in sources.read(config.name, config.path, config.image_size)
    )
    for split, records in (("training", train), ("test", test)):
        if len(records) == 0:
            raise UserError(f"data.name is {config.name!r}: it has no {split} records")
    train = half(train, config.half)
    if config.validation_size == 0:
        return Dataset(train, test, None)
    _check_validation(config, len(train))
    order = np.random.default_rng(0).permutation(len(train))  # public: a fixed split
    return Dataset(
        train.subset(order[config.validation_size :]),
        test,
        train.subset(order[: config.validation_size]),
    )


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


def half(records: Records, number: int) -> Records:
    """Returns all records (0), or a half of them (1 or 2); an odd one is in neither."""
    if number == 0:
        return records
    size = len(records) // 2
    order = np.random.default_rng(1).permutation(len(records))  # public: fixed
    return records.subset(order[(number - 1) * size : number * size])


def _check_validation(config: DataConfig, num_records: int) -> None:
    if config.validation_size >= num_records:
        raise UserError(
            f"data.validation_size is {config.validation_size}: it must be less than"
            f" the number of training records, {num_records}"
        )
