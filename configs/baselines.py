"""Every method of the DP-Mix paper side by side, epsilon 1 and 8, 5 paired seeds.

python experiments/sweep.py --config=configs/baselines.py

The argument is the data: digits (if none is given, with public digits drawn from fonts)
or cifar10 (WRN-16-4, with a bank in banks/cifar10, see experiments/
generate.py). Self-Aug at K = 34 and 36 does the work of DP-Mix_self and
DP-Mix_diff without mixing. The last row trains on the public images first, without
noise; the poster says that mixing them in helps and this does not.

Hardware: as for the config of one run. Hours: on digits 1.7 on two CPU cores beside
other jobs; on CIFAR-10 not measured. Accuracy: docs/results/baselines_digits.md; the
paper has no such row, its Tables 11 and 12 have some of these on other data.

Learning rates are those of the base config but for `microbatch_mixup`, whose noise is
2 m times larger for the same mean: on digits chosen among 0.03, 0.1 and 0.3 on
validation records (one seed, epsilon 1 and 8).
"""

import ml_collections

from configs import table10
from configs._base import method, sweep
from dpmix_jax.run.config import choose

# By data: config of one run, its public images, updates of pre-training, learning
# rates of microbatch_mixup at m = 2 and 8.
BASES = {
    "digits": (*table10.BASES["digits"], 200, (0.1, 0.03)),
    "cifar10": (*table10.BASES["cifar10"], 20_000, (0.1, 0.03)),
}


def get_config(data: str = "digits") -> ml_collections.ConfigDict:
    base, public, pretrain, rates = choose(BASES, data, "data")
    naive = [
        method("microbatch_mixup", k_base=1, group_size=m)
        | {"optimizer.learning_rate": rate}
        for m, rate in zip((2, 8), rates, strict=True)
    ]
    self_aug = {k: method("self_aug", k_base=k) for k in (16, 34, 36)}
    rows = (
        ("DP-SGD", method("dp_sgd")),
        *((f"Self-Aug, K = {k}", settings) for k, settings in self_aug.items()),
        ("DP-Mix_self, 16 + 18", method("dp_mix_self", k_base=16, k_self=18)),
        (
            "DP-Mix_diff, 16 + 2 + 18",
            method("dp_mix_diff", k_base=16, k_diff=2, k_self=18) | public,
        ),
        (
            "Pure-DP-Mix_diff, 2 + 18",
            method("pure_dp_mix_diff", k_diff=2, k_self=18) | public,
        ),
        ("Microbatch mixup, m = 2", naive[0]),
        ("Microbatch mixup, m = 8", naive[1]),
        (
            "Pre-trained, then Self-Aug, K = 16",
            self_aug[16] | public | {"pretrain.num_updates": pretrain},
        ),
    )
    return sweep(
        title=f"The paper's methods and baselines, {data}",
        base=f"configs/{base}.py:{{epsilon}}",
        rows=rows,
        columns={"epsilon": ("1", "8")},
    )
