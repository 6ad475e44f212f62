"""Convolutions whose patches do not overlap."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class Patches(nn.Module):
    """A convolution with a stride as large as its kernel: one matrix product.

    As a product it has fast gradients for each record under `jax.vmap`, which
    convolutions have not. What is left at the lower and right edges is dropped, as
    PyTorch's convolutions do without padding.

    Attributes:
      features: output channels.
      size: side of the square patches.
      use_bias: whether to add one.
      dtype: of the computation; parameters are float32.
    """

    features: int
    size: int
    use_bias: bool = True
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H // size, W // size, features]."""
        batch, channels, size = x.shape[0], x.shape[-1], self.size
        height, width = (side // size for side in x.shape[1:3])
        kernel = self.param(
            "kernel",
            nn.initializers.normal(0.02),
            (size, size, channels, self.features),
        ).astype(self.dtype)
        x = x[:, : height * size, : width * size].astype(self.dtype)
        x = x.reshape(batch, height, size, width, size, channels)
        x = x.swapaxes(2, 3).reshape(batch, height, width, -1)
        out = x @ kernel.reshape(-1, self.features)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            out = out + bias[None, None, None].astype(self.dtype)
        return out
