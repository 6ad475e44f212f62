"""Sweep: what each part of `scattering_fashion_mnist.py` is worth, at epsilon 3.

python experiments/sweep.py --config=configs/scattering_ablation.py

Accuracy on 5,000 validation records, which no row trains on; three seeds, each row
compared with the config as it is in pairs of the same seed. Where the size of a step
changes with the row, the learning rate keeps the distance that all updates may go.

With the argument kept, in the place of parts, what is lost where a record's views are
kept: two of them are embedded in each update, or 1, 4 or 16 pairs of them once, in half
precision. Test accuracy after training on half of the records, with batches and updates
halved, since embedding takes the time. One seed: differences below 0.3 say nothing.

Hardware: two CPU cores. Hours: 1 for parts, 0.3 for kept.

Accuracy: docs/results/fashion_mnist.md.
"""

import ml_collections

from configs._base import sweep
from dpmix_jax.run.config import choose

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
)
FRESH = "in each update"
KEPT: tuple[tuple[str, dict], ...] = (
    *((f"kept, M = {sets}", {"finetune.sets": sets}) for sets in (1, 4, 16)),
    (FRESH, {"finetune.embeddings": "fresh"}),
)
HALVED = {
    "data": {"half": 1},
    "method": {"name": "self_aug", "k_base": 2},
    "privacy": {"expected_batch_size": 4096, "num_updates": 140},
    "optimizer": {"learning_rate": 16.0},
    "performance": {"microbatch_size": "512"},
}
# By argument: rows, settings of all of them, and what is told of them.
ABLATIONS = {
    "parts": (
        ROWS,
        {"data": {"validation_size": 5000}},
        {
            "title": "What each part is worth on Fashion-MNIST",
            "seeds": 3,
            "metric": "nonprivate/validation/accuracy_ema",
            "baseline": BASELINE,
        },
    ),
    "kept": (
        KEPT,
        HALVED,
        {
            "title": "Views embedded once or in each update, on half of Fashion-MNIST",
            "seeds": 1,
            "baseline": FRESH,
        },
    ),
}


def get_config(ablation: str = "parts") -> ml_collections.ConfigDict:
    rows, common, told = choose(ABLATIONS, ablation, "ablation")
    base = "configs/scattering_fashion_mnist.py:3"
    return sweep(base=base, rows=rows, common=common, **told)
