"""A WRN-16-1 on scikit-learn's digits, to be fine-tuned after pre-training.

python experiments/run.py --config=configs/wrn_digits.py

One image a record. The argument is the epsilon, one of 1, 2, 3, 4, 6, 8
(3 if none is given). configs/trainable_digits.py has the commands that pre-train it on
drawn digits and fine-tune parts of it. The paper has no such row.

Hardware: two CPU cores. Hours: 0.01. Accuracy: docs/results/trainable_digits.md.
"""

import ml_collections

from configs import digits
from dpmix_jax.run.config import choose

ROWS = digits.ROWS  # by epsilon: updates, learning rate


def get_config(epsilon: str = "3") -> ml_collections.ConfigDict:
    choose(ROWS, epsilon)
    config = digits.get_config(epsilon)
    config.model = ml_collections.ConfigDict(
        {"name": "wrn", "depth": 16, "width": 1, "groups": 16, "order": 0}
    )
    config.method = ml_collections.ConfigDict({"name": "dp_sgd"})
    config.performance.microbatch_size = "128"
    return config
