"""DP-Mix_self with WRN-16-4 on EuroSAT from scratch, epsilon 1 to 8.

python experiments/run.py --config=configs/wrn16_4_eurosat.py:8

The argument is the epsilon, one of 1, 2, 3, 4, 6, 8 (8 if none is given). Self-Aug is
--config.method.name=self_aug. Paper row: DP-Mix's training from scratch (Section 5.1),
on the paper's split of 21,600 and 5,400 records.

Images are reduced from 64x64 to 32x32. --config.data.image_size=0
--config.augmentation.max_shift=8 trains on them as they are, at four times the cost.

Hardware: one GPU; `auto` takes as many records at a time as fit.
Hours: not measured. Reckoned for one H200 with --config.performance.precision=bfloat16,
0.7 to 0.8 s an update: 0.2 h at epsilon 1, 0.6 h at 8.

Accuracy: not measured here, and we know of no published number from scratch that we
could quote; DP-Mix's Table 10 fine-tunes.

Rows as in configs/wrn16_4_cifar10.py, whose header says where they come from, but for
B: 2048 of 21,600 records is nearly the sampling probability of 4096 of 50,000. None is
tuned here.
"""

import ml_collections
from ml_collections import config_dict

from dpmix_jax.config import choose

# By epsilon: updates, learning rate.
ROWS = {
    "1": (875, 2.0),
    "2": (1125, 2.0),
    "3": (1593, 4.0),
    "4": (1687, 4.0),
    "6": (1843, 4.0),
    "8": (2600, 4.0),
}


def get_config(epsilon: str = "8") -> ml_collections.ConfigDict:
    num_updates, learning_rate = choose(ROWS, epsilon)
    return ml_collections.ConfigDict(
        {
            # None draws a secret seed, as a guarantee needs; give one to repeat a run.
            "seed": config_dict.placeholder(int),
            "data": {
                "name": "eurosat",
                "path": config_dict.placeholder(str),  # None: the default place
                "image_size": 32,
                "validation_size": 0,
            },
            # What dp_mix_diff draws from, for instance npz and a path.
            "public": {
                "name": config_dict.placeholder(str),
                "path": config_dict.placeholder(str),
                "image_size": config_dict.placeholder(int),
                "half": config_dict.placeholder(int),
            },
            # On the public images, without noise, before the private training.
            "pretrain": {"num_updates": 0, "batch_size": 256, "learning_rate": 0.1},
            # Weights to start from, and names of the modules to train.
            "finetune": {
                "encoder": config_dict.placeholder(str),
                "weights": config_dict.placeholder(str),
                "skip": "",
                "trainable": "all",
            },
            "model": {"name": "wrn", "depth": 16, "width": 4, "groups": 16, "order": 0},
            "method": {
                "name": "dp_mix_self",  # or self_aug, dp_sgd, dp_mix_diff
                "k_base": 16,
                "k_self": 18,
                "alpha": 0.2,
                "distinct_pairs": True,
            },
            "augmentation": {"flip": True, "max_shift": 4, "subpixel": False},
            "privacy": {
                "epsilon": float(epsilon),
                "delta": 1e-5,
                "expected_batch_size": 2048,
                "num_updates": num_updates,
                "l2_clip_norm": 1.0,
                "neighboring_relation": "add_or_remove_one",
            },
            "optimizer": {
                "learning_rate": learning_rate,
                "momentum": 0.0,
                "ema_decay": 0.9999,
            },
            "performance": {"microbatch_size": "auto", "precision": "float32"},
            "logging": {
                "log_every": 10,
                "eval_every": 100,
                "checkpoint_every": 50,
            },
        }
    )
