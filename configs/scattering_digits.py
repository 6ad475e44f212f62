"""DP-Mix_self with a linear head on scattering coefficients of scikit-learn's digits.

python experiments/run.py --config=configs/scattering_digits.py

Fine-tuning in seconds: the encoder is frozen, needs no file of weights, and stands for
the CLIP towers of configs/vit_b16.py in the small tables. The argument is the epsilon,
one of 1, 2, 4, 8 (1 if none is given). The paper has no such row.

Hardware: two CPU cores. Hours: 0.01. Accuracy: docs/results/fine_tuned_digits.md. The
learning rate is the lower of two that did best on validation records at epsilon 2 (one
seed, 0.5 to 8); updates are those of configs/digits.py.
"""

import ml_collections

from configs._base import experiment
from configs.digits import ROWS as UPDATES
from dpmix_jax.run.config import choose

# By epsilon: updates, learning rate.
ROWS = {epsilon: (UPDATES[epsilon][0], 1.0) for epsilon in ("1", "2", "4", "8")}


def get_config(epsilon: str = "1") -> ml_collections.ConfigDict:
    num_updates, learning_rate = choose(ROWS, epsilon)
    return experiment(
        data={"name": "digits"},
        model={"name": "scattering_linear", "scales": 1, "roots": True, "groups": 9},
        finetune={"trainable": "head"},
        method={"name": "dp_mix_self", "k_base": 4, "k_self": 4},
        augmentation={"flip": False, "max_shift": 0.5, "subpixel": True},
        privacy={
            "epsilon": float(epsilon),
            "expected_batch_size": 256,
            "num_updates": num_updates,
        },
        optimizer={"learning_rate": learning_rate, "ema_decay": 0.95},
        performance={"microbatch_size": "256"},
        logging={"log_every": 20, "eval_every": 1000, "checkpoint_every": 100},
    )
