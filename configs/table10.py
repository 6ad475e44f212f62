"""Table 10: how useful are public images? Methods A, B and C at epsilon 2, 5 seeds.

python experiments/sweep.py --config=configs/table10.py

S1 and S2 are the two halves of the training set. A is DP-Mix_self on S1; B DP-Mix_diff
on S1 with synthetic images; C DP-Mix_diff on S1 with S2, as if that were public: in C
the records of S2 are not protected, which is what it is for. A fourth row, Self-Aug on
S1 with as many images, tells what mixing adds.

The argument is the data: digits (if none is given, with synthetic digits drawn from
fonts) or cifar10 (WRN-16-4 from scratch, with a bank in banks/cifar10).

Hardware: as for the config of one run. Hours: for digits 0.3 on two CPU cores, for
CIFAR-10 not measured. Accuracy: docs/results/table10_digits.md. The paper's row
is of ViT-B-16 and ConvNeXt, fine-tuned, and is not comparable.
"""

import ml_collections

from configs._base import method, sweep
from dpmix_jax.run.config import choose

# By data: config of one run, its synthetic images.
BASES = {
    "digits": ("digits", {"public.name": "rendered_digits"}),
    "cifar10": (
        "wrn16_4_cifar10",
        {"public.name": "bank", "public.path": "banks/cifar10"},
    ),
}


def get_config(data: str = "digits") -> ml_collections.ConfigDict:
    base, synthetic = choose(BASES, data, "data")
    diff = method("dp_mix_diff", k_base=16, k_diff=2, k_self=18)
    return sweep(
        title=f"Table 10: methods A, B and C, {data}",
        base=f"configs/{base}.py:{{epsilon}}",
        rows=(
            ("Self-Aug, K = 36", method("self_aug", k_base=36)),
            ("A: DP-Mix_self", method("dp_mix_self", k_base=16, k_self=18)),
            ("B: DP-Mix_diff, synthetic", diff | synthetic),
            ("C: DP-Mix_diff, S2", diff | {"public.name": data, "public.half": 2}),
        ),
        columns={"epsilon": ("2",)},
        common={"data": {"half": 1}},
    )
