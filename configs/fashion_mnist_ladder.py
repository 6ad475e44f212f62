"""Sweep: Fashion-MNIST by scattering and a linear classifier, epsilon 1 to 8.

python experiments/sweep.py --config=configs/fashion_mnist_ladder.py

With the argument methods, in the place of plain, what views and mixups are worth there
at epsilon 3: DP-SGD on one image a record, Self-Aug on two and four, DP-Mix_self and,
with drawn clothes as public images, DP-Mix_diff on four. On 5,000 validation records
the learning rate 16 did as well as 8 or better for each of them, DP-SGD included, so
that all rows have it. With epsilons the same methods at epsilon 1, 2, 4 and 8, at the
learning rates that plain has there. With cnn the same methods train a small CNN on the
coefficients, and with pixels another small CNN on pixels, at all five epsilons; DP-SGD
at the cost of four images a record has a row there.

Hardware: two CPU cores. Hours: 0.7 for plain, 1.5 for methods, 2 for epsilons, 4 for
cnn, 5 for pixels.

Accuracy: docs/results/fashion_mnist.md.
"""

import ml_collections

from configs._base import method, sweep
from dpmix_jax.run.config import choose

METHODS = (
    ("DP-SGD", method("dp_sgd")),
    ("Self-Aug, K = 2", method("self_aug", k_base=2)),
    ("Self-Aug, K = 4", method("self_aug", k_base=4)),
    ("DP-Mix_self, 2 + 2", method("dp_mix_self", k_base=2, k_self=2)),
    (
        "DP-Mix_diff, 2 + 1 + 1",
        method("dp_mix_diff", k_base=2, k_diff=1, k_self=1)
        | {"public.name": "rendered_clothes", "public.count": 3000},
    ),
)


def equal_cost(batch_size: int) -> tuple[str, dict]:
    """Returns DP-SGD on as many images as four views of a fourth of the records are."""
    batch = {"privacy.expected_batch_size": batch_size}
    return f"DP-SGD, B = {batch_size}", method("dp_sgd") | batch


EPSILONS = ("1", "2", "3", "4", "8")
SCATTERING = "scattering_fashion_mnist"
# By argument: title, config of one run, rows, epsilons, settings of all rows.
LADDERS = {
    "plain": (
        "scattering and a linear classifier",
        SCATTERING,
        METHODS[:1],
        EPSILONS,
        {},
    ),
    "methods": (
        "views and mixups on scattering coefficients",
        SCATTERING,
        METHODS,
        ("3",),
        {"optimizer": {"learning_rate": 16.0}},
    ),
    "epsilons": (
        "views and mixups on scattering coefficients, other epsilons",
        SCATTERING,
        METHODS,
        ("1", "2", "4", "8"),
        {},
    ),
    "cnn": (
        "views and mixups with a small CNN on scattering coefficients",
        "scattering_cnn_fashion_mnist",
        (*METHODS, equal_cost(8192)),
        EPSILONS,
        {},
    ),
    "pixels": (
        "views and mixups on pixels",
        "fashion_mnist",
        (*METHODS, equal_cost(2048)),
        EPSILONS,
        {},
    ),
}
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


def get_config(ladder: str = "plain") -> ml_collections.ConfigDict:
    title, base, rows, epsilons, common = choose(LADDERS, ladder, "ladder")
    return sweep(
        title=f"Fashion-MNIST, {title}",
        base=f"configs/{base}.py:{{epsilon}}",
        rows=rows,
        columns={"epsilon": epsilons},
        common=common,
        baseline="DP-SGD",
        paper=PUBLISHED if ladder == "plain" else None,
    )
