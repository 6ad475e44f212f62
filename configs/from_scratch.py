"""Training from scratch at epsilon 1, 2, 4 and 8, 5 paired seeds: DP-Mix, Section 5.1.

python experiments/sweep.py --config=configs/from_scratch.py

The argument is the data: cifar10 (if none is given), cifar100 or eurosat (WRN-16-4, as
in the paper), fashion_mnist or digits (small networks, and sets of 4 + 4 or 2 + 2
images for 16 + 18). Self-Aug on as many images as DP-Mix_self is not in the paper.

Hardware: as for the config of one run. Hours: for digits 0.5 on two CPU cores, for the
others not measured. Accuracy: docs/results/from_scratch_digits.md.
"""

import ml_collections

from configs import table11
from configs._base import method, sweep
from dpmix_jax.run.config import choose

# By data: config of one run, k_base, k_self.
BASES = {
    **table11.BASES,
    "cifar100": ("wrn16_4_cifar100", 16, 18),
    "eurosat": ("wrn16_4_eurosat", 16, 18),
}
EPSILONS = ("1", "2", "4", "8")
RERUNS = {
    "source": "Re-runs by the first author of DP-Mix (Bao and Bindschaedler, 2024):"
    " means of 3; Self-Aug at epsilon 2 and 4 is another of theirs, in PyTorch.",
    "cells": tuple(
        (row, epsilon, value)
        for row, values in (
            ("DP-SGD", ("52.75", None, None, "71.68")),
            ("Self-Aug, K = 16", ("56.06", "62.90", "69.45", "77.79")),
            ("DP-Mix_self, 16 + 18", ("57.24", None, None, "78.49")),
        )
        for epsilon, value in zip(EPSILONS, values, strict=True)
        if value is not None
    ),
}


def get_config(data: str = "cifar10") -> ml_collections.ConfigDict:
    base, k_base, k_self = choose(BASES, data, "data")
    return sweep(
        title=f"Training from scratch, {data}",
        base=f"configs/{base}.py:{{epsilon}}",
        rows=(("DP-SGD", method("dp_sgd")), *table11.rows(k_base, k_self)),
        columns={"epsilon": EPSILONS},
        paper=RERUNS if data == "cifar10" else None,
    )
