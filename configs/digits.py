"""DP-Mix_self on scikit-learn's 1,797 handwritten digits, epsilon 1 to 8.

python experiments/run.py --config=configs/digits.py

The argument is the epsilon, one of 1, 2, 3, 4, 6, 8 (3 if none is given), for instance
--config=configs/digits.py:8. The paper has no such row.

Hardware: two CPU cores. Hours: 25 s at epsilon 3, calibration and compilation included.
Accuracy: 95.28 % at epsilon 3 (median of 5 seeds, 94.44 to 95.56;
docs/results/digits.md), not measured at the others. Epsilon 3 was tuned on validation
records; T at the others is scaled by eye from there, and their rate is that of 3.
"""

import ml_collections

from configs._base import experiment
from dpmix_jax.run.config import choose

# Updates by epsilon.
ROWS = {"1": 60, "2": 80, "3": 100, "4": 120, "6": 140, "8": 160}


def get_config(epsilon: str = "3") -> ml_collections.ConfigDict:
    return experiment(
        data={"name": "digits"},
        model={"name": "cnn", "features": (16, 32), "groups": 8},
        method={"name": "dp_mix_self", "k_base": 4, "k_self": 4},
        # At 8x8 a whole pixel is a large move, and a mirrored digit is no digit.
        augmentation={"flip": False, "max_shift": 0.5, "subpixel": True},
        privacy={
            "epsilon": float(epsilon),
            "expected_batch_size": 256,
            "num_updates": choose(ROWS, epsilon),
        },
        optimizer={"learning_rate": 1.0, "ema_decay": 0.95},
        performance={"microbatch_size": "32"},
        logging={"log_every": 5, "eval_every": 10, "checkpoint_every": 10},
    )
