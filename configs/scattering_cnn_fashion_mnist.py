"""A private small CNN on scattering coefficients of Fashion-MNIST.

python experiments/run.py --config=configs/scattering_cnn_fashion_mnist.py

The argument is the epsilon, one of 1, 2, 3, 4, 8 (3 if none is given). The paper has
no such row.

Hardware: two CPU cores. Hours: 0.02, less than a minute.

Accuracy: docs/results/fashion_mnist.md, at epsilon 3. A linear classifier of whitened
coefficients, `scattering_fashion_mnist.py`, is better.

The network is that of Tramer and Boneh (2021, Appendix C), roots and normalisation are
those of the linear classifier. Rates are DP-SGD's on 5,000 validation records; none was
tried for views.
"""

import ml_collections

from configs._base import experiment
from dpmix_jax.run.config import choose

# Learning rates by epsilon.
ROWS = {"1": 8.0, "2": 16.0, "3": 16.0, "4": 16.0, "8": 16.0}


def get_config(epsilon: str = "3") -> ml_collections.ConfigDict:
    return experiment(
        data={"name": "fashion_mnist"},
        model={
            "name": "scattering_cnn",
            "scales": 2,
            "angles": 8,
            "roots": True,
            "groups": 27,
            "epsilon": 1e-2,
        },
        finetune={"embeddings": "kept"},
        method={"name": "dp_sgd"},
        augmentation={"flip": False, "max_shift": 1.0},
        privacy={
            "epsilon": float(epsilon),
            "expected_batch_size": 2048,
            "num_updates": 200,
            "l2_clip_norm": 0.1,
        },
        optimizer={
            "learning_rate": choose(ROWS, epsilon),
            "momentum": 0.9,
            "ema_decay": 0.95,
        },
        performance={"clipping": "ghost", "microbatch_size": "64"},
        logging={"log_every": 20, "eval_every": 1000, "checkpoint_every": 100},
    )
