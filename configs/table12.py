"""Table 12 of the DP-Mix paper: DP-Mix_diff without views of the image, epsilon 1.

python experiments/sweep.py --config=configs/table12.py \
    --set=finetune.encoder=open_clip_model.safetensors

The argument is the data: cifar100 (a linear head on ViT-B-16, as in the paper, with a
bank of synthetic images in banks/cifar100, if none is given) or digits (a linear head
on scattering coefficients, with digits drawn from fonts). Self-Aug on as many images as
DP-Mix_self is not in the paper. 5 paired seeds.

Hardware: as for the config of one run. Hours: for digits 0.1 on two CPU cores, for
cifar100 not measured. Accuracy: docs/results/fine_tuned_digits.md.
"""

import ml_collections

from configs import fine_tuned
from configs._base import method, sweep
from dpmix_jax.run.config import choose

# By data: row of `configs/fine_tuned.py`.
POINTS = {"cifar100": "vit_b16-cifar100", "digits": "digits"}
PAPER = ("79.3 (.2)", "81.8 (.2)", "82.0 (.1)", "80.9 (.2)")


def get_config(data: str = "cifar100") -> ml_collections.ConfigDict:
    point = choose(POINTS, data, "data")
    base, synthetic, k_base, k_diff, k_self = fine_tuned.BASES[point]
    num_public, equal = max(k_diff, 2), k_base + k_self
    pure = method("pure_dp_mix_diff", k_diff=num_public, k_self=k_self) | synthetic
    rows = (
        *fine_tuned.methods(synthetic, k_base, k_diff, k_self),
        (f"Pure-DP-Mix_diff, {num_public} + {k_self}", pure),
        (f"Self-Aug, K = {equal}", method("self_aug", k_base=equal)),
    )
    names = [name for name, _ in rows]
    paper = {
        "source": "Table 12 of Bao et al., 2023; it does not say how many public images"
        " and mixups Pure-DP-Mix_diff draws.",
        "cells": tuple(zip(names, "1111", PAPER, strict=False)),
    }
    return sweep(
        title=f"Table 12: DP-Mix_diff without views, {data}",
        base=f"configs/{base}",
        rows=rows,
        columns={"epsilon": ("1",)},
        baseline=names[0],
        paper=paper if data == "cifar100" else None,
    )
