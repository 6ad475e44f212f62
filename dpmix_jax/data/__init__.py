"""Datasets: one record type, and sources of it by name."""

import dataclasses
from typing import NamedTuple

import numpy as np

from dpmix_jax.data.digits import load_digits
from dpmix_jax.data.npz import load_npz
from dpmix_jax.data.records import Records
from dpmix_jax.errors import UserError

__all__ = ["DataConfig", "Dataset", "Records", "load"]

_EMBEDDED = {"digits": load_digits}
_FILES = {"npz": load_npz}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which records to train and to test on.

    Attributes:
      name: `digits` (1,437 + 360 handwritten digits of 8x8, embedded in scikit-learn),
        or `npz` (arrays of your own, see `data.npz`).
      path: of the file, for `npz`.
      validation_size: records taken from the training set (the same for every run) for
        choosing hyperparameters; they are neither trained on nor covered by the
        guarantee, so what is measured on them is named `nonprivate/...`.
    """

    name: str = "digits"
    path: str | None = None
    validation_size: int = 0

    def __post_init__(self):
        if self.name not in _EMBEDDED | _FILES:
            raise UserError(
                f"data.name is {self.name!r}: it must be one of"
                f" {', '.join(_EMBEDDED | _FILES)}"
            )
        if (self.path is None) == (self.name in _FILES):
            needed = "the path of a file" if self.name in _FILES else "None"
            raise UserError(
                f"data.path is {self.path}: it must be {needed} for data.name"
                f" {self.name!r}"
            )
        if self.validation_size < 0:
            raise UserError(
                f"data.validation_size is {self.validation_size}: it must be at least 0"
            )


class Dataset(NamedTuple):
    train: Records
    test: Records
    validation: Records | None


def load(config: DataConfig) -> Dataset:
    """Reads a dataset and splits off the validation records, if asked for.

    Raises:
      UserError: if the data cannot be read, or are too few.
    """
    if config.path is None:
        train, test = _EMBEDDED[config.name]()
    else:
        train, test = _FILES[config.name](config.path)
    for split, records in (("training", train), ("test", test)):
        if len(records) == 0:
            raise UserError(f"data.name is {config.name!r}: it has no {split} records")
    if config.validation_size == 0:
        return Dataset(train, test, None)
    if config.validation_size >= len(train):
        raise UserError(
            f"data.validation_size is {config.validation_size}: it must be less than"
            f" the number of training records, {len(train)}"
        )
    order = np.random.default_rng(0).permutation(len(train))  # public: a fixed split
    return Dataset(
        train.subset(order[config.validation_size :]),
        test,
        train.subset(order[: config.validation_size]),
    )
