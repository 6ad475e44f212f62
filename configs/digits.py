"""DP-Mix_self on scikit-learn's 1,797 handwritten digits at (3, 1e-5), in two minutes.

python experiments/run.py --config=configs/digits.py
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            # None draws a secret seed, as a guarantee needs; give one to repeat a run.
            "seed": config_dict.placeholder(int),
            "data": {
                "name": "digits",
                "path": config_dict.placeholder(str),
                "validation_size": 0,
            },
            "model": {"name": "cnn", "features": (16, 32), "groups": 8},
            "method": {
                "name": "dp_mix_self",  # or self_aug, or dp_sgd
                "k_base": 4,
                "k_self": 4,
                "alpha": 0.2,
                "distinct_pairs": True,
            },
            # At 8x8 a whole pixel is a large move, and a mirrored digit is no digit.
            "augmentation": {"flip": False, "max_shift": 0.5, "subpixel": True},
            "privacy": {
                "epsilon": 3.0,
                "delta": 1e-5,
                "expected_batch_size": 256,
                "num_updates": 100,
                "l2_clip_norm": 1.0,
                "neighboring_relation": "add_or_remove_one",
            },
            "optimizer": {"learning_rate": 1.0, "momentum": 0.0, "ema_decay": 0.95},
            # Records at a time: a number, or auto for as many as fit into memory.
            "performance": {"microbatch_size": "32", "precision": "float32"},
            "logging": {"log_every": 5, "eval_every": 10, "checkpoint_every": 10},
        }
    )
