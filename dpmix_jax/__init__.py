"""Differentially private image classification with DP-Mix, on JAX and jax_privacy.

The core is functions over arrays and pytrees, for any `loss_fn(params, images,
labels)`. Axes: B records, K images of an augmentation set, H W C image, O classes.

    augment        views of one image                      [H,W,C] -> [k,H,W,C]
    pool           public images of which sets draw a few  [M,H,W,C]
    mixup          the augmentation set of one record      -> [K,H,W,C], [K,O]
    conv           convolutions whose per-record gradients are fast, in any model
    tuning         times formulations of convolutions, finds the fastest on this device
    gradients      loss -> clipped sum of per-record gradients, with its sensitivity
    ghost          the same sum, from factors of gradients where factors are smaller
    accounting     (epsilon, delta) <-> noise multiplier
    privacy        what is promised, and the step that adds noise
    noise          the noise itself, exact on a grid
    factorization  noise that is correlated between updates
    optimizers     optimizers made for noisy gradients, to chain after the privatizer
    selection      the best of many runs, with the choice accounted for
    sampling       the Poisson batch of a step, and keys
    allocation     the epsilon when each record is in one random batch per epoch
    training       one update as pure functions, and the loop over it
    audit          replay on neighbours, and attacks that bound epsilon from below
    devices        where arrays lie, and the sum over all devices

The packages around the core, which does not depend on them, are `baselines`, `models`,
`data` and `synthetic`, and `run` and `sweeps`, which assemble runs from a config.
"""

import os
from collections.abc import Callable

import numpy as np

from dpmix_jax import optimizers
from dpmix_jax.accounting import Mechanism, NeighboringRelation, calibrate
from dpmix_jax.audit import check_sensitivity
from dpmix_jax.augment import AugmentationConfig, random_view, views
from dpmix_jax.conv import fast_convolutions
from dpmix_jax.errors import UserError
from dpmix_jax.ghost import ghost_clipped_gradient
from dpmix_jax.gradients import clipped_gradient
from dpmix_jax.mixup import MethodConfig, augmentation_set, mixups, random_pairs
from dpmix_jax.pool import Pool, make_pool
from dpmix_jax.privacy import PrivacyConfig, privatizer
from dpmix_jax.sampling import (
    batches,
    microbatches,
    noise_key,
    poisson_batch,
    record_keys,
    stream_key,
)
from dpmix_jax.selection import Selection

__version__ = "0.1.0"

__all__ = [
    "AugmentationConfig",
    "Mechanism",
    "MethodConfig",
    "NeighboringRelation",
    "Pool",
    "PrivacyConfig",
    "Selection",
    "UserError",
    "augmentation_set",
    "batches",
    "calibrate",
    "check_sensitivity",
    "clipped_gradient",
    "fast_convolutions",
    "ghost_clipped_gradient",
    "load",
    "make_pool",
    "microbatches",
    "mixups",
    "noise_key",
    "optimizers",
    "poisson_batch",
    "privatizer",
    "random_pairs",
    "random_view",
    "record_keys",
    "stream_key",
    "views",
]


def load(
    folder: str | os.PathLike, *, encoder: str | None = None, weights: str | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Loads the model of a finished run, or of its export; see `run.export.load`."""
    from dpmix_jax.run import export  # it brings Flax, which the core does not need

    return export.load(folder, encoder=encoder, weights=weights)
