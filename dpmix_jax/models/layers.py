"""Layers that several models share. None of them mixes records."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpmix_jax.errors import require


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


def layer_norm(
    x: jax.Array, epsilon: float, dtype: jax.typing.DTypeLike, name: str
) -> jax.Array:
    """[..., C] -> [..., C]: layer normalisation (Ba et al., 2016), in float32.

    The variance is of centred values: as mean(x^2) - mean(x)^2, flax.linen's default,
    it would lose the digits of vectors with a large mean, which CLIP's towers have.
    """
    norm = nn.LayerNorm(epsilon, jnp.float32, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32)).astype(dtype)


def max_pool(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H // 2, W // 2, C]: the maximum of each 2x2 square.

    A row or column that is left over is dropped, as `flax.linen.max_pool` does. Where
    numbers of a square are equal and largest, they share its gradient. XLA's own
    gradient of a pooling takes ten to twenty times as long on a CPU.

    Raises:
      UserError: if nothing is left of the images.
    """
    require(min(x.shape[1:3]) >= 2, "images to pool", x.shape[1:3], "at least 2x2")
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


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


def dense(
    features: int,
    dtype: jax.typing.DTypeLike,
    name: str,
    stddev: float = 0.02,
    *,
    use_bias: bool = True,
) -> nn.Dense:
    """Returns a dense layer whose kernel starts normal, of deviation `stddev`."""
    start = nn.initializers.normal(stddev)
    return nn.Dense(features, use_bias, dtype=dtype, kernel_init=start, name=name)


def mlp(x: jax.Array, hidden: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[..., C] -> [..., C]: layers `fc1` and `fc2` with the exact GELU between them.

    The layers belong to the module that calls this function.
    """
    y = nn.gelu(dense(hidden, dtype, "fc1")(x), approximate=False)
    return dense(x.shape[-1], dtype, "fc2")(y)


class LinearHead(nn.Dense):
    """A linear classifier of embeddings of any shape.

    It starts at zero, as is usual for linear probes: all classes are equally likely,
    and its first gradient does not depend on chance.
    """

    kernel_init: nn.initializers.Initializer = nn.initializers.zeros

    def __call__(self, x: jax.Array) -> jax.Array:
        """Embeddings [B, ...] -> logits [B, O]."""
        return super().__call__(x.reshape(x.shape[0], -1))


class EncoderAndHead(nn.Module):
    """An image encoder and a classifier of its embeddings.

    Parameters are `{"encoder": ..., "head": ...}`, and `"whitening"` where there is
    one; `pretrained.load_encoder` reads weights for the encoder. An encoder without
    parameters leaves `{"head": ...}`.

    Attributes:
      encoder: maps images [B, H, W, C] to embeddings [B, ...] in float32.
      head: maps embeddings to logits [B, O]; None leaves it out: the result is the
        embedding.
      whitening: maps embeddings to embeddings [B, ...] before the head; None leaves it
        out.
    """

    encoder: nn.Module
    head: nn.Module | None = None
    whitening: nn.Module | None = None

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> logits [B, O], or embeddings [B, ...] without a head."""
        embedding = self.whiten(self.encoder(images))
        return embedding if self.head is None else self.head(embedding)

    def whiten(self, embedding: jax.Array) -> jax.Array:
        """Embeddings [B, ...] -> embeddings [B, ...], whitened if they are to be."""
        return embedding if self.whitening is None else self.whitening(embedding)

    @property
    def CPU_IMAGES(self) -> int | None:  # noqa: N802, a constant of the encoder
        """How many images the encoder takes at a time on a CPU; None for all."""
        return getattr(self.encoder, "CPU_IMAGES", None)
