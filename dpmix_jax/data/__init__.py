"""Datasets: one record type, and sources of it by name."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dpmix_jax.data.digits import load_digits
from dpmix_jax.data.records import Records
from dpmix_jax.errors import UserError

__all__ = ["DataConfig", "Dataset", "Records", "SOURCES", "load"]

SOURCES: dict[str, Callable[[], tuple[Records, Records]]] = {"digits": load_digits}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which records to train and to test on.

    Attributes:
      name: `digits` (1,437 + 360 handwritten digits of 8x8, embedded in scikit-learn).
      validation_size: records taken from the training set (the same for every run) for
        choosing hyperparameters; they are neither trained on nor covered by the
        guarantee, so what is measured on them is named `nonprivate/...`.
    """

    name: str = "digits"
    validation_size: int = 0

    def __post_init__(self):
        if self.name not in SOURCES:
            raise UserError(
                f"data.name is {self.name!r}: it must be one of {', '.join(SOURCES)}"
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
    """Reads a dataset and splits off the validation records, if asked for."""
    train, test = SOURCES[config.name]()
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
