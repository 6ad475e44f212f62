"""A linear head on a frozen encoder at epsilon 1, 2, 4 and 8: DP-Mix, Section 5.2.

python experiments/sweep.py --config=configs/fine_tuned.py:vit_b16-caltech256 \
    --set=finetune.encoder=open_clip_model.safetensors

The argument is the encoder, vit_b16 or convnext_base, and the data, one of cifar10,
cifar100, eurosat, caltech256, sun397 and oxford_iiit_pet (vit_b16-cifar10 if none is
given), with a bank of synthetic images in banks/<data>; or digits, which takes
scattering coefficients for the encoder and draws digits from fonts. Self-Aug on as many
images as DP-Mix_self is not in the paper. 5 paired seeds.

Hardware: as for the config of one run. Hours: for digits 0.5 on two CPU cores, for the
others not measured. Accuracy: docs/results/fine_tuned_digits.md.
"""

import ml_collections

from configs import vit_b16
from configs._base import method, sweep
from dpmix_jax.run.config import choose

# By encoder and data: config of one run, its synthetic images, k_base, k_diff, k_self.
BASES = {
    f"{encoder}-{data}": (
        f"{encoder}.py:{data}-{{epsilon}}",
        {"public.name": "bank", "public.path": f"banks/{data}"},
        *(16, 2, 18),
    )
    for encoder in ("vit_b16", "convnext_base")
    for data in vit_b16.DATASETS
}
BASES["digits"] = (
    "scattering_digits.py:{epsilon}",
    {"public.name": "rendered_digits"},
    *(4, 1, 4),
)
EPSILONS = ("1", "2", "4", "8")
# Self-Aug, DP-Mix_self and DP-Mix_diff at these.
RERUNS = {
    "vit_b16-caltech256": (
        ("80.36", "89.67", "92.01", "93.17"),
        ("81.21", "90.12", "92.17", "93.39"),
        ("89.69", "91.82", "92.86", "93.87"),
    ),
    "vit_b16-sun397": (
        ("72.65", "76.02", "78.05", "79.54"),
        ("73.19", "76.45", "78.67", "79.57"),
        ("75.12", "77.78", "79.47", "80.57"),
    ),
    "vit_b16-oxford_iiit_pet": (
        ("72.21", "82.11", "85.84", "88.23"),
        ("72.45", "82.51", "86.75", "88.70"),
        ("83.24", "86.28", "88.25", "89.41"),
    ),
}


def get_config(point: str = "vit_b16-cifar10") -> ml_collections.ConfigDict:
    base, synthetic, k_base, k_diff, k_self = choose(BASES, point, "encoder and data")
    of_paper = methods(synthetic, k_base, k_diff, k_self)
    equal = k_base + k_self
    rows = (*of_paper, (f"Self-Aug, K = {equal}", method("self_aug", k_base=equal)))
    cells = tuple(
        (row, epsilon, value)
        for (row, _), values in zip(of_paper, RERUNS.get(point, ()), strict=False)
        for epsilon, value in zip(EPSILONS, values, strict=True)
    )
    source = "Re-runs by the first author of DP-Mix: Bao and Bindschaedler, 2024."
    return sweep(
        title=f"A linear head on a frozen encoder, {point}",
        base=f"configs/{base}",
        rows=rows,
        columns={"epsilon": EPSILONS},
        paper={"source": source, "cells": cells} if cells else None,
    )


def methods(synthetic: dict, k_base: int, k_diff: int, k_self: int) -> tuple:
    """Returns the paper's three methods as rows, DP-Mix_diff with these images."""
    mixed = method("dp_mix_self", k_base=k_base, k_self=k_self)
    diff = method("dp_mix_diff", k_base=k_base, k_diff=k_diff, k_self=k_self)
    return (
        (f"Self-Aug, K = {k_base}", method("self_aug", k_base=k_base)),
        (f"DP-Mix_self, {k_base} + {k_self}", mixed),
        (f"DP-Mix_diff, {k_base} + {k_diff} + {k_self}", diff | synthetic),
    )
