"""Sweep: better noise and better steps for the same epsilon, beside plain DP-SGD.

python experiments/sweep.py --config=configs/same_epsilon.py

DP-SGD on one image a record at epsilon 3, five paired seeds; rows differ in how
gradients are clipped, in the noise, in the batches, or in what is made of the private
mean (docs/same_epsilon.md). The argument is digits or fashion_mnist, there scattering
coefficients and a linear classifier.

Each row has the settings of the best mean accuracy of EMA weights on validation
records, with two other seeds, of those that docs/results/same_epsilon_digits.md and
docs/results/fashion_mnist.md list; clipping per layer (on digits) and random allocation
have DP-SGD's learning rate. Random allocation needs
`pip install -e ".[allocation]"`.

Hardware: two CPU cores. Hours: 0.15 for digits, 1 for fashion_mnist.

Accuracy: docs/results/same_epsilon_digits.md, docs/results/fashion_mnist.md.
"""

from typing import Any

import ml_collections

from configs._base import method, sweep
from dpmix_jax.run.config import choose

# By base config and row: what differs from it.
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {
        "DP-SGD": {"optimizer.learning_rate": 1.0},
        "automatic clipping": {
            "optimizer.learning_rate": 1.0,
            "privacy.clipping_rule": "automatic",
        },
        "clipping per layer": {
            "optimizer.learning_rate": 1.0,
            "privacy.per_layer": True,
        },
        "correlated noise, 2 bands": {
            "optimizer.learning_rate": 1.0,
            "privacy.mechanism": "bandmf",
            "privacy.bands": 2,
        },
        # 17 epochs of six batches, where the others have 17.8.
        "random allocation": {
            "optimizer.learning_rate": 1.0,
            "privacy.sampling": "allocation",
            "privacy.expected_batch_size": 240,
            "privacy.num_updates": 102,
        },
        "AdamBC": {
            "optimizer.name": "adam_bc",
            "optimizer.learning_rate": 0.01,
            "optimizer.momentum": 0.9,
            "optimizer.second_moment_decay": 0.99,
            "optimizer.floor": 1e-4,
        },
        "low-pass filter": {
            "optimizer.learning_rate": 1.0,
            "optimizer.filter": "low_pass",
            "optimizer.filter_gain": 0.3,
        },
        "Kalman filter": {
            "optimizer.learning_rate": 1.0,
            "optimizer.filter": "kalman",
            "optimizer.filter_gain": 0.7,
        },
    },
    "fashion_mnist": {
        "DP-SGD": {},
        "automatic clipping": {
            "optimizer.learning_rate": 12.0,
            "privacy.clipping_rule": "automatic",
        },
        # Not per layer: a linear classifier is one.
        "correlated noise, 2 bands": {
            "privacy.mechanism": "bandmf",
            "privacy.bands": 2,
        },
        # Epochs of seven batches; the others take 7.3 to see as many records.
        "random allocation": {
            "privacy.sampling": "allocation",
            "privacy.expected_batch_size": 8571,
        },
        "AdamBC": {
            "optimizer.name": "adam_bc",
            "optimizer.learning_rate": 0.01,
            "optimizer.second_moment_decay": 0.99,
        },
        "low-pass filter": {
            "optimizer.filter": "low_pass",
            "optimizer.filter_gain": 0.6,
        },
        "Kalman filter": {
            "optimizer.learning_rate": 16.0,
            "optimizer.filter": "kalman",
            "optimizer.filter_gain": 0.5,
        },
    },
}
BASES = {"digits": "digits", "fashion_mnist": "scattering_fashion_mnist"}


def get_config(base: str = "digits") -> ml_collections.ConfigDict:
    rows = choose(ROWS, base, "base")
    return sweep(
        title=f"Noise and steps for the same epsilon, {base}",
        base=f"configs/{BASES[base]}.py:{{epsilon}}",
        rows=tuple(
            (row, method("dp_sgd") | settings) for row, settings in rows.items()
        ),
        columns={"epsilon": ("3",)},
        baseline="DP-SGD",
    )
