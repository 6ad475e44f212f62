"""Sweep: what each part of `scattering_fashion_mnist.py` is worth, at epsilon 3.

python experiments/sweep.py --config=configs/scattering_ablation.py

Accuracy on 5,000 validation records, which no row trains on; three seeds, each row
compared with the config as it is in pairs of the same seed. Where the size of a step
changes with the row, the learning rate keeps the distance that all updates may go.

Hardware: two CPU cores. Hours: 1.

Accuracy: docs/results/fashion_mnist.md.
"""

import ml_collections

from configs._base import method, sweep

BASELINE = "as configured"
ROWS: tuple[tuple[str, dict], ...] = (
    (BASELINE, {}),
    # So much regularization leaves every axis its own scale.
    ("axes as they are", {"finetune.whitening": 1e6}),
    ("without roots", {"model.roots": False}),
    ("without normalisation", {"model.groups": 0}),
    ("normalised as one group", {"model.groups": 1}),
    ("one order", {"model.order": 1}),
    ("J = 1", {"model.scales": 1}),
    ("J = 3", {"model.scales": 3}),
    ("L = 4", {"model.angles": 4}),
    ("B = 4096", {"privacy.expected_batch_size": 4096}),
    ("B = 16384", {"privacy.expected_batch_size": 16384}),
    ("T = 140", {"privacy.num_updates": 140, "optimizer.learning_rate": 16.0}),
    ("T = 560", {"privacy.num_updates": 560, "optimizer.learning_rate": 4.0}),
    ("rate 4", {"optimizer.learning_rate": 4.0}),
    ("rate 16", {"optimizer.learning_rate": 16.0}),
    ("C = 1", {"privacy.l2_clip_norm": 1.0, "optimizer.learning_rate": 0.8}),
    ("no momentum", {"optimizer.momentum": 0.0, "optimizer.learning_rate": 80.0}),
    ("no EMA", {"optimizer.ema_decay": 0.0}),
    ("Self-Aug, K = 2, M = 1", method("self_aug", k_base=2)),
    ("Self-Aug, K = 2, M = 4", method("self_aug", k_base=2) | {"finetune.sets": 4}),
)


def get_config() -> ml_collections.ConfigDict:
    return sweep(
        title="What each part is worth on Fashion-MNIST",
        base="configs/scattering_fashion_mnist.py:3",
        rows=ROWS,
        common={"data": {"validation_size": 5000}},
        seeds=3,
        metric="nonprivate/validation/accuracy_ema",
        baseline=BASELINE,
    )
