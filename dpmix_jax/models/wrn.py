"""Wide residual networks as De et al. (2022) train them privately."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpmix_jax.models.layers import GroupNorm

_FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class WSConv(nn.Module):
    """Convolution with scaled weight standardisation, a gain and a bias.

    Each filter is brought to mean 0 and variance gain / fan-in (Brock et al., 2021).

    Attributes:
      features: output channels.
      kernel_size: side of the square kernel.
      stride: along both axes; padding is `SAME`.
      dtype: of the convolution; weights are standardised in float32.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", _FAN_IN, shape)
        gain = self.param("gain", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        fan_in = shape[0] * shape[1] * shape[2]
        axes = (0, 1, 2)
        centred = kernel - kernel.mean(axes, keepdims=True)
        variance = jnp.square(centred).mean(axes)
        scale = gain * jax.lax.rsqrt(jnp.maximum(variance * fan_in, 1e-4))
        out = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            (centred * scale[None, None, None]).astype(self.dtype),
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return out + bias[None, None, None].astype(self.dtype)


class WideResNet(nn.Module):
    """WRN-depth-width (Zagoruyko and Komodakis, 2016) with ReLU -> GroupNorm -> WSConv.

    Attributes:
      num_classes: O.
      depth: 6 n + 4, for n blocks of two convolutions in each of three stages.
      width: factor on the 16, 32 and 64 channels of the stages.
      groups: of each GroupNorm (normalising over a batch would mix records).
      order: of layers in the shortcuts that change shape: 0 for ReLU -> GroupNorm ->
        convolution, as De et al., 3 for convolution -> GroupNorm -> ReLU (Bao and
        Bindschaedler, 2024, who find it better).
      dtype: of the computation; parameters and logits are float32.
    """

    num_classes: int
    depth: int = 16
    width: int = 4
    groups: int = 16
    order: int = 0
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth is {self.depth}: it must be 6 n + 4, at least 10")
        if self.order not in (0, 3):
            raise ValueError(f"order is {self.order}: it must be 0 or 3")
        x = self._conv(images, 16)
        for stage, channels in enumerate((16, 32, 64)):
            for block in range((self.depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                x = self._block(x, channels * self.width, stride, block == 0)
        x = self._norm(nn.relu(x)).astype(jnp.float32).mean(axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=_FAN_IN)(x)

    def _block(
        self, x: jax.Array, channels: int, stride: int, reshape: bool
    ) -> jax.Array:
        shortcut = x
        if reshape and self.order == 0:
            shortcut = self._norm(nn.relu(shortcut))
            shortcut = self._conv(shortcut, channels, 1, stride)
        elif reshape:
            shortcut = self._conv(shortcut, channels, 1, stride)
            shortcut = nn.relu(self._norm(shortcut))
        for step in (stride, 1):
            x = self._conv(self._norm(nn.relu(x)), channels, 3, step)
        return x + shortcut

    def _conv(self, x, channels: int, kernel_size: int = 3, stride: int = 1):
        return WSConv(channels, kernel_size, stride, self.dtype)(x)

    def _norm(self, x: jax.Array) -> jax.Array:
        return GroupNorm(self.groups, dtype=self.dtype)(x)
