"""DP-Mix_self with a linear head on CLIP's ViT-B-16, fine-tuned on six datasets.

python experiments/run.py --config=configs/vit_b16.py:caltech256-2 \
    --config.finetune.encoder=open_clip_model.safetensors

The argument is the dataset, one of cifar10, cifar100, eurosat, caltech256, sun397 and
oxford_iiit_pet, and the epsilon, 1, 2, 4 or 8 (cifar10-1 if none is given). The file is
open_clip's ViT-B-16 trained on LAION-2B, which `hf download
laion/CLIP-ViT-B-16-laion2B-s34B-b88K open_clip_model.safetensors` fetches. Without it
the frozen encoder is random. --config.finetune.trainable=all trains everything, and
head,ln_post,block_11 the end of the encoder as well.

Hardware: one GPU; `auto` takes as many records at a time as fit. Hours: not measured.
The paper: 2 h 12 for Self-Aug and 7 h 33 for DP-Mix_self on Caltech256, one A100.

Accuracy: not measured here. Published for the linear head, epsilon 1 / 2 / 4 / 8, Bao
and Bindschaedler, 2024:

    Caltech256   DP-Mix_self 81.21 90.12 92.17 93.39   Self-Aug 80.36 89.67 92.01 93.17
    SUN397       DP-Mix_self 73.19 76.45 78.67 79.57   Self-Aug 72.65 76.02 78.05 79.54
    Oxford Pet   DP-Mix_self 72.45 82.51 86.75 88.70   Self-Aug 72.21 82.11 85.84 88.23

Where the rows come from: batch, epochs, sets, EMA and weight decay are those of the
paper's script. It searched the learning rate for each dataset and gives no values: ours
is a guess, to be replaced by a search on validation records, for instance with
configs/rates.py. That search costs privacy which the statement does not cover.
"""

import ml_collections

from configs._base import experiment
from dpmix_jax.run.config import choose

BATCH_SIZE, EPOCHS, SIZE = 1_000, 10, 224
# By dataset: training records, side at which images are stored (0: their own; those of
# one size are enlarged on the device).
DATASETS = {
    "cifar10": (50_000, 0),
    "cifar100": (50_000, 0),
    "eurosat": (21_600, 0),
    "caltech256": (24_485, SIZE),
    "sun397": (87_003, SIZE),
    "oxford_iiit_pet": (3_680, SIZE),
}
POINTS = {
    f"{data}-{epsilon}": (data, float(epsilon))
    for data in DATASETS
    for epsilon in (1, 2, 4, 8)
}


def get_config(point: str = "cifar10-1") -> ml_collections.ConfigDict:
    data, epsilon = choose(POINTS, point, "dataset and epsilon")
    num_records, stored = DATASETS[data]
    return experiment(
        data={
            "name": data,
            "image_size": stored,
            "resize": 0 if stored else SIZE,
            "normalization": "clip",
        },
        finetune={"trainable": "head"},
        model={
            "name": "vit",
            "patch_size": 16,
            "width": 768,
            "depth": 12,
            "heads": 12,
            "embedding_size": 512,
        },
        method={"name": "dp_mix_self"},
        privacy={
            "epsilon": epsilon,
            "expected_batch_size": BATCH_SIZE,
            "num_updates": -(-EPOCHS * num_records // BATCH_SIZE),
        },
        optimizer={"learning_rate": 2.0, "weight_decay": 1e-5},
        logging={"log_every": 5, "eval_every": 50, "checkpoint_every": 10},
    )
