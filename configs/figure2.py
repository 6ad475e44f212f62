"""Figure 2 of the DP-Mix paper: how large gradients are before the clip, epsilon 1.

python experiments/sweep.py --config=configs/figure2.py:digits

The argument is the data: cifar10 or caltech256 (a linear head on ViT-B-16 as in the
paper, cifar10 if none is given, with a bank of synthetic images in banks/<data> and
--set=finetune.encoder=open_clip_model.safetensors) or digits (a small network, with
digits drawn from fonts). Self-Aug on as many images as DP-Mix_self is not in the paper.

The table has the standard deviation over parameters of the magnitude of a parameter's
gradient, averaged over all records drawn in training; `nonprivate_figure2.png` has the
densities of these averages, whole and by stage of the training. The paper's
"per-parameter gradient magnitude averaged over samples" is taken for the mean of
absolute values.

Hardware: as for the config of one run. Hours: for digits 0.1 on two CPU cores, for the
others not measured. Accuracy: docs/results/figure2_digits.md.
"""

import ml_collections

from configs import fine_tuned
from configs._base import method, sweep
from dpmix_jax.run.config import choose

# By data: config of one run, its synthetic images, k_base, k_diff and k_self.
BASES = {
    "digits": ("digits.py:{epsilon}", *fine_tuned.BASES["digits"][1:]),
    **{data: fine_tuned.BASES[f"vit_b16-{data}"] for data in ("cifar10", "caltech256")},
}
PAPER = {
    "cifar10": ("2.16e-3", "9.76e-4", "9.59e-4"),
    "caltech256": ("1.43e-3", "1.07e-3", "9.32e-4"),
}


def get_config(data: str = "cifar10") -> ml_collections.ConfigDict:
    base, synthetic, k_base, k_diff, k_self = choose(BASES, data, "data")
    of_paper = fine_tuned.methods(synthetic, k_base, k_diff, k_self)
    equal = k_base + k_self
    names = [name for name, _ in of_paper]
    paper = {
        "source": "Appendix B.5 of Bao et al., 2023.",
        "cells": tuple(zip(names, PAPER.get(data, ()), strict=False)),
    }
    return sweep(
        title=f"Figure 2: gradients before the clip, {data}",
        base=f"configs/{base}".replace("{epsilon}", "1"),
        rows=(*of_paper, (f"Self-Aug, K = {equal}", method("self_aug", k_base=equal))),
        common={"diagnostics": {"gradients": True}},
        metric="nonprivate/gradient_stddev",
        baseline=names[0],
        paper=paper if data in PAPER else None,
    )
