"""Sweep: scattering and a linear classifier on Fashion-MNIST, epsilon 1 to 8.

python experiments/sweep.py --config=configs/scattering_ladder.py

With the argument methods, in the place of plain, what views and mixups are worth at
epsilon 3: DP-SGD on one image a record, Self-Aug on two and four, DP-Mix_self and, with
drawn clothes as public images, DP-Mix_diff on four. On 5,000 validation records the
learning rate 16 did as well as 8 or better for each of them, DP-SGD included, so that
all rows have it.

Hardware: two CPU cores. Hours: 0.6 for plain, 1.2 for methods.

Accuracy: docs/results/fashion_mnist.md.
"""

import ml_collections

from configs._base import method, sweep
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
COMMON = {"plain": {}, "methods": {"optimizer": {"learning_rate": 16.0}}}
PUBLISHED = {
    "source": "DPSUR and all below it: Table 2 of arXiv 2311.14056; scattering:"
    " Tramer and Boneh (2021).",
    "cells": tuple(
        (row, epsilon, value)
        for row, values in (
            ("DPSUR", ("88.38", "89.34", "89.71", "90.18")),
            ("scattering and a linear classifier", (None, None, "89.7", None)),
            ("handcrafted scattering features", ("85.54", "87.96", "89.01", "89.06")),
            ("tempered sigmoids", ("83.63", "85.33", "86.29", "86.86")),
            ("plain DP-SGD", ("80.25", "82.63", "84.72", "85.40")),
        )
        for epsilon, value in zip("1234", values, strict=True)
        if value is not None
    ),
}


def get_config(rows: str = "plain") -> ml_collections.ConfigDict:
    return sweep(
        title="Scattering and a linear classifier on Fashion-MNIST",
        base="configs/scattering_fashion_mnist.py:{epsilon}",
        rows=choose(ROWS, rows, "rows"),
        columns={"epsilon": EPSILONS[rows]},
        common=COMMON[rows],
        baseline="DP-SGD",
        paper=PUBLISHED if rows == "plain" else None,
    )
