"""A small convolutional network for small images."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpmix_jax.models.layers import GroupNorm, max_pool


class CNN(nn.Module):
    """3x3 convolutions with GroupNorm and ReLU, each later one after a 2x2 max pool.

    Attributes:
      num_classes: O.
      features: channels of each convolution.
      groups: groups of each GroupNorm (normalising over a batch would mix records).
      strided: whether each convolution has stride 2, in the place of pools: about three
        times faster.
      dtype: of the computation; parameters and logits are float32.
    """

    num_classes: int
    features: Sequence[int] = (32, 64)
    groups: int = 8
    strided: bool = False
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i, channels in enumerate(self.features):
            if i > 0 and not self.strided:
                x = max_pool(x)
            strides = 1 + self.strided
            x = nn.Conv(channels, (3, 3), strides, use_bias=False, dtype=self.dtype)(x)
            x = nn.relu(GroupNorm(self.groups, dtype=self.dtype)(x))
        x = x.reshape((x.shape[0], -1)).astype(jnp.float32)
        return nn.Dense(self.num_classes)(x)
