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

from configs import digits
from dpmix_jax.run.config import choose

# By epsilon: updates, learning rate.
ROWS = {epsilon: digits.ROWS[epsilon] for epsilon in ("1", "2", "4", "8")}


def get_config(epsilon: str = "1") -> ml_collections.ConfigDict:
    choose(ROWS, epsilon)
    config = digits.get_config(epsilon)
    config.model = ml_collections.ConfigDict(
        {"name": "scattering_linear", "scales": 1, "roots": True, "groups": 9}
    )
    config.finetune.trainable = "head"
    config.performance.microbatch_size = "256"
    return config
