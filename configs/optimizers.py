"""Sweep: plain SGD beside steps that know of the noise, on digits, epsilon 3.

python experiments/sweep.py --config=configs/optimizers.py

DP-SGD on one image a record: the mean, the noise and the budget are the same in each
row, only what is made of the private mean differs (docs/optimizers.md). 5 paired seeds.

Of the grid in docs/results/optimizers_digits.md, each row's settings had the best mean
accuracy of EMA weights on 288 validation records with two other seeds.

Hardware: two CPU cores. Hours: 0.1. Accuracy: docs/results/optimizers_digits.md.
"""

import ml_collections

from configs._base import method

# By row: settings of the optimizer.
ROWS = {
    "SGD": {"learning_rate": 1.0},
    "AdamBC": {
        "name": "adam_bc",
        "learning_rate": 0.01,
        "momentum": 0.9,
        "second_moment_decay": 0.99,
        "floor": 1e-4,
    },
    "low-pass filter": {
        "filter": "low_pass",
        "filter_gain": 0.3,
        "learning_rate": 1.0,
    },
    "Kalman filter": {"filter": "kalman", "filter_gain": 0.7, "learning_rate": 1.0},
}


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "title": "Steps that know of the noise, digits",
            "base": "configs/digits.py:{epsilon}",
            "rows": tuple(
                (row, method("dp_sgd") | {"optimizer": settings})
                for row, settings in ROWS.items()
            ),
            "columns": {"epsilon": ("3",)},
            "seeds": 5,
            "metric": "test_accuracy_ema",
            "baseline": "SGD",
        }
    )
