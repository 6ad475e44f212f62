"""What configs share: the groups of a run's settings, and the rows of sweeps."""

import dataclasses
from typing import Any

import ml_collections
from ml_collections import config_dict

from dpmix_jax.run.config import ExperimentConfig

# `public` are images declared public, for dp_mix_diff, pretrain and finetune.whitening.
GROUPS = [f.name for f in dataclasses.fields(ExperimentConfig) if f.name != "seed"]


def experiment(**groups: dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns the config of a run.

    Args:
      groups: settings by group. Others have the defaults of their dataclass in
        `dpmix_jax`, and a flag sets them all the same.
    """
    # None draws a secret seed, as a guarantee needs; give one to repeat a run.
    seed = config_dict.placeholder(int)
    empty: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    return ml_collections.ConfigDict({"seed": seed, **empty, **groups})


def sweep(**values: Any) -> ml_collections.ConfigDict:
    """Returns the config of a sweep, of five seeds unless told otherwise.

    Args:
      values: settings of a `SweepConfig`; without `metric` the test accuracy.
    """
    usual = {"seeds": 5, "metric": "test_accuracy_ema"}
    return ml_collections.ConfigDict(usual | values)


def method(
    name: str, *, k_base: int = 0, k_diff: int = 0, k_self: int = 0, **others: int
) -> dict[str, Any]:
    """Returns a method as settings of a sweep's row: all sizes, whatever the base has.

    Args:
      name: of the method.
      k_base: views of an image.
      k_diff: public images.
      k_self: mixups of pairs.
      others: settings of this method alone.
    """
    sizes = {"k_base": k_base, "k_diff": k_diff, "k_self": k_self, **others}
    return {"method.name": name} | {f"method.{key}": n for key, n in sizes.items()}
