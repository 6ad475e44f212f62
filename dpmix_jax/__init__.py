"""Differentially private image classification with DP-Mix, on JAX and jax_privacy.

The core is functions over arrays and pytrees, for any `loss_fn(params, images,
labels)`. Axes: B records, K members of an augmentation set, H W C image, O classes.

    augment    views of one image                          [H,W,C] -> [k,H,W,C]
    bank       public images of which sets draw a few      [M,H,W,C]
    mixup      the augmentation set of one record          -> [K,H,W,C], [K,O]
    conv       convolutions whose per-record gradients are fast, in any model
    gradients  loss -> clipped sum of per-record gradients, with its sensitivity
    ghost      the same from norms alone, without per-record gradients
    privacy    (epsilon, delta) <-> noise multiplier, and the noise
    sampling   the Poisson batch of a step, and keys
    selection  the best of many runs, with the choice accounted for

`training` puts them together, `experiment` runs a config, `statement` says what is
promised.
"""

from dpmix_jax.augment import AugmentationConfig, random_view, views
from dpmix_jax.bank import Bank, make_bank
from dpmix_jax.conv import fast_convolutions
from dpmix_jax.errors import UserError
from dpmix_jax.ghost import ghost_clipped_gradient
from dpmix_jax.gradients import clipped_gradient, with_shared_terms
from dpmix_jax.mixup import (
    MethodConfig,
    augmentation_set,
    group_set,
    mixups,
    random_pairs,
)
from dpmix_jax.privacy import (
    Mechanism,
    NeighboringRelation,
    PrivacyConfig,
    calibrate,
    privatizer,
)
from dpmix_jax.sampling import (
    microbatches,
    poisson_batch,
    random_groups,
    record_keys,
    stream_key,
)
from dpmix_jax.selection import Selection

__version__ = "0.1.0"

__all__ = [
    "AugmentationConfig",
    "Bank",
    "Mechanism",
    "MethodConfig",
    "NeighboringRelation",
    "PrivacyConfig",
    "Selection",
    "UserError",
    "augmentation_set",
    "calibrate",
    "clipped_gradient",
    "fast_convolutions",
    "ghost_clipped_gradient",
    "group_set",
    "make_bank",
    "microbatches",
    "mixups",
    "poisson_batch",
    "privatizer",
    "random_groups",
    "random_pairs",
    "random_view",
    "record_keys",
    "stream_key",
    "views",
    "with_shared_terms",
]
