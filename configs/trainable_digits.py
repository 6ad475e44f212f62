"""Sweep: what fine-tuning a part of a model is worth at epsilon 3, on digits.

python experiments/run.py --config=configs/wrn_digits.py --workdir=runs/drawn_digits \
    --config.public.name=rendered_digits --config.pretrain.num_updates=1000 \
    --config.pretrain.learning_rate=0.05 --config.privacy.num_updates=1 \
    --config.optimizer.learning_rate=1e-6 --config.optimizer.ema_decay=0 \
    --config.seed=0
python experiments/sweep.py --config=configs/trainable_digits.py

The first command pre-trains a WRN-16-1 on digits that are drawn from fonts. Every run
makes a private update, here one that moves weights by a millionth of its length: the
epsilon of the rows leaves it out. So this is for comparisons with known seeds, and a
release would take weights that no private record has touched.

Rows differ in what DP-SGD then trains: the last layer; the biases of all layers as well
(BiTFiT, Bu et al., 2022); the scales of norms as well; adapters of rank 4 (LoRA, Yu et
al., 2022); or all. The last row trains all from random weights.

Learning rates are those of the best accuracy of EMA weights on 288 validation records
(one other seed; docs/results/trainable_digits.md lists all).

Hardware: two CPU cores. Hours: 0.3. Accuracy: docs/results/trainable_digits.md; the
paper has no such table.
"""

from typing import Any

import ml_collections

from configs._base import sweep

WEIGHTS = "runs/drawn_digits/model.safetensors"
# By row: what differs.
ROWS: dict[str, dict[str, Any]] = {
    "all": {"optimizer.learning_rate": 2.0},
    "last layer": {"finetune.trainable": "Dense_0", "optimizer.learning_rate": 6.0},
    "last layer, biases": {
        "finetune.trainable": "Dense_0,bias",
        "optimizer.learning_rate": 6.0,
    },
    "last layer, biases, scales": {
        "finetune.trainable": "Dense_0,bias,scale",
        "optimizer.learning_rate": 6.0,
    },
    "last layer, rank 4": {
        "finetune.trainable": "Dense_0",
        "finetune.rank": 4,
        "optimizer.learning_rate": 2.0,
    },
}


def get_config() -> ml_collections.ConfigDict:
    pretrained = {"finetune.weights": WEIGHTS}
    return sweep(
        title="What is trained after pre-training, digits",
        base="configs/wrn_digits.py:3",
        rows=(
            *((row, pretrained | settings) for row, settings in ROWS.items()),
            ("all, not pre-trained", ROWS["all"]),
        ),
        common={"privacy": {"num_updates": 40}, "logging": {"eval_every": 40}},
        baseline="all",
    )
