"""Sweep: scattering and a linear classifier on Fashion-MNIST, epsilon 1 to 8.

python experiments/sweep.py --config=configs/scattering_ladder.py

With the argument methods, in the place of plain, what views and mixups are worth at
epsilon 3: Self-Aug, DP-Mix_self and, with drawn clothes as public images, DP-Mix_diff,
all on four images a record.

Hardware: two CPU cores. Hours: 1 for plain; methods was not run here, about 3.

Accuracy: docs/results/fashion_mnist.md.
"""

import ml_collections

from configs._base import method
from dpmix_jax.run.config import choose

ROWS = {
    "plain": (("DP-SGD", method("dp_sgd")),),
    "methods": (
        ("DP-SGD", method("dp_sgd")),
        ("Self-Aug, K = 2", method("self_aug", k_base=2)),
        ("Self-Aug, K = 4", method("self_aug", k_base=4)),
        ("DP-Mix_self, 2 + 2", method("dp_mix_self", k_base=2, k_self=2)),
        (
            "DP-Mix_diff, 2 + 1 + 1",
            method("dp_mix_diff", k_base=2, k_diff=1, k_self=1),
        ),
    ),
}
EPSILONS = {"plain": ("1", "2", "3", "4", "8"), "methods": ("3",)}


def get_config(rows: str = "plain") -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "title": "Scattering and a linear classifier on Fashion-MNIST",
            "base": "configs/scattering_fashion_mnist.py:{epsilon}",
            "seeds": 5,
            "rows": choose(ROWS, rows, "rows"),
            "columns": {"epsilon": EPSILONS[rows]},
            "metric": "test_accuracy_ema",
            "baseline": "DP-SGD",
        }
    )
