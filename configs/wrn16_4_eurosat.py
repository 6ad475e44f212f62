"""DP-Mix_self with WRN-16-4 on EuroSAT from scratch, epsilon 1 to 8.

python experiments/run.py --config=configs/wrn16_4_eurosat.py:8

The argument is the epsilon, one of 1, 2, 3, 4, 6, 8 (8 if none is given). Self-Aug is
--config.method.name=self_aug. Paper row: DP-Mix's training from scratch (Section 5.1),
on the paper's split of 21,600 and 5,400 records.

Images are reduced from 64x64 to 32x32. --config.data.image_size=0
--config.augmentation.max_shift=8 trains on them as they are, at four times the cost.

Hardware: one GPU; `auto` takes as many records at a time as fit.
Hours: not measured. Reckoned for one H200 with --config.performance.precision=bfloat16,
0.7 to 0.8 s an update: 0.2 h at epsilon 1, 0.6 h at 8.

Accuracy: not measured here, and we know of no published number from scratch that we
could quote; DP-Mix's Table 10 fine-tunes.

Rows as in configs/wrn16_4_cifar10.py, whose header says where they come from, but for
B: 2048 of 21,600 records is nearly the sampling probability of 4096 of 50,000. None is
tuned here.
"""

import ml_collections

from configs import wrn16_4_cifar10

ROWS = wrn16_4_cifar10.ROWS


def get_config(epsilon: str = "8") -> ml_collections.ConfigDict:
    config = wrn16_4_cifar10.get_config(epsilon)
    config.data.name, config.data.image_size = "eurosat", 32
    config.privacy.expected_batch_size = 2_048
    return config
