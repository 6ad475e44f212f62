"""DP-Mix_self with WRN-16-4 on CIFAR-100 from scratch, epsilon 1 to 8.

python experiments/run.py --config=configs/wrn16_4_cifar100.py:8

The argument is the epsilon, one of 1, 2, 3, 4, 6, 8 (8 if none is given). Self-Aug is
--config.method.name=self_aug. Paper row: DP-Mix's training from scratch (Section 5.1).

Hardware: one GPU; `auto` takes as many records at a time as fit.
Hours: not measured. Reckoned for one H200 with --config.performance.precision=bfloat16,
1.4 to 1.5 s an update: 0.4 h at epsilon 1, 1.1 h at 8.

Accuracy: not measured here, and we know of no published number from scratch that we
could quote; DP-Mix's Tables 10 and 12 fine-tune.

All values are those of configs/wrn16_4_cifar10.py, whose header says where they come
from: the number of records is the same, so is the noise. None is tuned for 100 classes.
"""

import ml_collections

from configs import wrn16_4_cifar10

ROWS = wrn16_4_cifar10.ROWS


def get_config(epsilon: str = "8") -> ml_collections.ConfigDict:
    config = wrn16_4_cifar10.get_config(epsilon)
    config.data.name = "cifar100"
    return config
