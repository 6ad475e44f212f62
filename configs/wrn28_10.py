"""DP-Mix_self with a pre-trained WRN-28-10 on CIFAR-10 or CIFAR-100, epsilon 1 to 8.

python experiments/run.py --config=configs/wrn28_10.py:cifar100-1 \
    --config.finetune.weights=wrn_28_10_imagenet32.safetensors

The argument is the dataset, cifar10 or cifar100, and the epsilon, 1, 2, 4 or 8
(cifar10-1 if none is given). The file is a WRN-28-10 of ours, the model.safetensors of
a run, or that of De et al., pre-trained on ImageNet at 32x32 pixels, for which
dpmix_jax/models/pretrained.py has the lines that convert it. Its last layer is left
out. Self-Aug, as De et al. fine-tune, is --config.method.name=self_aug. Without a file
a run is refused, but for --config.finetune.skip=, which trains from random weights.

Hardware: one GPU; `auto` takes as many records at a time as fit. Hours: not measured.
--dry_run estimates them; an update is of 16,384 records, 557,056 images.

Accuracy: not measured here: it needs the file and a GPU.

Where the rows come from: batch, clip norm, learning rate, K and T = 250 at epsilon 1
are those of the one config that De et al. published (CIFAR-100; sigma 21.1, here found
by calibration); so is the EMA decay of 0.9. T at epsilon 2, 4 and 8 is what we remember
of their appendix, with sigma 15.8, 12 and 9.4: RDP confirms that the pairs belong to
these epsilons. The rate is the same for all.
"""

import ml_collections

from configs._base import experiment
from dpmix_jax.run.config import choose

UPDATES = {1: 250, 2: 500, 4: 1000, 8: 2000}
POINTS = {
    f"{data}-{epsilon}": (data, float(epsilon), updates)
    for data in ("cifar10", "cifar100")
    for epsilon, updates in UPDATES.items()
}


def get_config(point: str = "cifar10-1") -> ml_collections.ConfigDict:
    data, epsilon, num_updates = choose(POINTS, point, "dataset and epsilon")
    return experiment(
        data={"name": data},
        finetune={"skip": "Dense_0"},
        model={"name": "wrn", "depth": 28, "width": 10, "groups": 16, "order": 0},
        method={"name": "dp_mix_self"},
        privacy={
            "epsilon": epsilon,
            "expected_batch_size": 16_384,
            "num_updates": num_updates,
        },
        optimizer={"learning_rate": 1.0, "ema_decay": 0.9},
        logging={"log_every": 5, "eval_every": 50, "checkpoint_every": 10},
    )
