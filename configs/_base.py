"""What configs share: the values that most runs have, and the rows of sweeps."""

from typing import Any

import ml_collections
from ml_collections import config_dict


def experiment(**groups: dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns the config of a run.

    Args:
      groups: what differs from the values below. A setting in neither of them has the
        default of its dataclass in `dpmix_jax`, and a flag sets it all the same.
    """
    config = ml_collections.ConfigDict(
        {
            # None draws a secret seed, as a guarantee needs; give one to repeat a run.
            "seed": config_dict.placeholder(int),
            "data": {"validation_size": 0},
            # Images declared public, for dp_mix_diff, pretrain and finetune.whitening.
            "public": {},
            # On the public images, without noise, before the private training.
            "pretrain": {"num_updates": 0},
            # Weights to start from, and names of the modules to train.
            "finetune": {"trainable": "all"},
            "model": {},
            # Without sizes a method has those of the paper.
            "method": {"alpha": 0.2, "distinct_pairs": True},
            "augmentation": {"flip": True, "max_shift": 4.0, "subpixel": False},
            "privacy": {
                "delta": 1e-5,
                "l2_clip_norm": 1.0,
                "neighboring_relation": "add_or_remove_one",
            },
            "optimizer": {"momentum": 0.0, "ema_decay": 0.9999},
            # Records at a time: a number, or auto for as many as fit into memory.
            "performance": {"microbatch_size": "auto", "precision": "float32"},
            "logging": {},
            "evaluate": {},
            "diagnostics": {},
        }
    )
    config.update(groups)
    return config


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
