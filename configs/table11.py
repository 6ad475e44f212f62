"""Table 11 of the DP-Mix paper: Self-Aug and DP-Mix_self at epsilon 1 and 8, 5 seeds.

python experiments/sweep.py --config=configs/table11.py

The argument is the data: cifar10 (if none is given, with WRN-16-4 as in the paper),
digits or fashion_mnist. The second row is not in the paper: Self-Aug on as many images
as DP-Mix_self, so that more views are not credited to mixing. On digits and
Fashion-MNIST the sets are smaller in proportion, 4 + 4 and 2 + 2 images for 16 + 18.

Hardware: as for the config of one run. Hours: not measured. Reckoned for CIFAR-10 on
one H200 with --set=performance.precision=bfloat16, 18 h; for digits 11 minutes on two
CPU cores (docs/results/table11_digits.md). Accuracy: printed beside the paper's.
"""

import ml_collections

from configs._base import method, sweep
from dpmix_jax.run.config import choose

# By data: config of one run, k_base, k_self.
BASES = {
    "cifar10": ("wrn16_4_cifar10", 16, 18),
    "digits": ("digits", 4, 4),
    "fashion_mnist": ("fashion_mnist", 2, 2),
}
PAPER = {
    "source": (
        "Table 11 of Bao et al., 2023: median of 5; we take the numbers in parentheses,"
        " which it does not explain, for standard deviations."
    ),
    "cells": (
        ("Self-Aug, K = 16", "1", "56.3 (.3)"),
        ("Self-Aug, K = 16", "8", "79.4 (.1)"),
        ("DP-Mix_self, 16 + 18", "1", "57.1 (.4)"),
        ("DP-Mix_self, 16 + 18", "8", "80.0 (.2)"),
    ),
}


def get_config(data: str = "cifar10") -> ml_collections.ConfigDict:
    base, k_base, k_self = choose(BASES, data, "data")
    return sweep(
        title=f"Table 11: Self-Aug and DP-Mix_self, {data}",
        base=f"configs/{base}.py:{{epsilon}}",
        rows=rows(k_base, k_self),
        columns={"epsilon": ("1", "8")},
        paper=PAPER if data == "cifar10" else None,
    )


def rows(k_base: int, k_self: int) -> tuple[tuple[str, dict], ...]:
    """Returns Self-Aug on fewer and on as many images as DP-Mix_self, and that."""
    return (
        *(
            (f"Self-Aug, K = {k}", method("self_aug", k_base=k))
            for k in (k_base, k_base + k_self)
        ),
        (
            f"DP-Mix_self, {k_base} + {k_self}",
            method("dp_mix_self", k_base=k_base, k_self=k_self),
        ),
    )
