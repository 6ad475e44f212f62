"""Sweep: CIFAR-10 by scattering and a linear classifier, epsilon 1 to 8.

python experiments/sweep.py --config=configs/cifar10_ladder.py

DP-SGD on one image of each record, and Self-Aug on four views. With the argument
methods, in the place of plain, what views and mixups are worth at epsilon 3, beside
DP-SGD at the cost of two images a record. With halves one half of the training set is
private and the other public, so that DP-Mix_diff mixes the best public images there
could be.

Hardware: two CPU cores. Hours: 1.6 for plain, 0.9 for methods, 0.8 for halves.

Accuracy: docs/results/cifar10.md.
"""

import ml_collections

from configs._base import method, sweep
from configs.fashion_mnist_ladder import METHODS
from dpmix_jax.run.config import choose

# Makes as many gradients of images as two views of half the records do.
EQUAL_COST = (
    "DP-SGD, B = 16384",
    method("dp_sgd") | {"privacy.expected_batch_size": 16384},
)
DIFF = ("DP-Mix_diff, 2 + 1 + 1", method("dp_mix_diff", k_base=2, k_diff=1, k_self=1))
HALVES = {
    "data": {"half": 1},
    "public": {"name": "cifar10", "half": 2},
    "privacy": {"expected_batch_size": 4096},
}
# By argument: title, rows, epsilons, settings of all rows.
LADDERS = {
    "plain": ("scattering and a linear classifier", METHODS[:3:2], "12348", {}),
    "methods": (
        "views and mixups on scattering coefficients",
        (*METHODS[:4], EQUAL_COST),
        "3",
        {},
    ),
    "halves": (
        "views and mixups with the other half as public images",
        (*METHODS[:4], DIFF),
        "3",
        HALVES,
    ),
}
PUBLISHED = {
    "source": "Tramer and Boneh (2021), scattering and a CNN, by another accounting.",
    "cells": tuple(
        ("scattering and a CNN", epsilon, value)
        for epsilon, value in zip(
            "12348", ("60.9", "67.0", "69.3", "69.7", "72.4"), strict=True
        )
    ),
}


def get_config(ladder: str = "plain") -> ml_collections.ConfigDict:
    title, rows, epsilons, common = choose(LADDERS, ladder, "ladder")
    return sweep(
        title=f"CIFAR-10, {title}",
        base="configs/scattering_cifar10.py:{epsilon}",
        rows=rows,
        columns={"epsilon": tuple(epsilons)},
        common=common,
        baseline="DP-SGD",
        paper=PUBLISHED if ladder == "plain" else None,
    )
