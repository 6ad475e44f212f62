"""The image tower of CLIP as a ConvNeXt."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpmix_jax.models.layers import Patches, dense, layer_norm, mlp

_EPSILON = 1e-6


class ConvNeXt(nn.Module):
    """ConvNeXt-B (Liu et al., 2022) with a projection: images to embeddings.

    The defaults are those of open_clip's `convnext_base_w`, timm's `convnext_base` with
    a projection: 88.2 million parameters, images of 256x256 pixels (others will do)
    normalised by `images.CLIP_MEAN` and `images.CLIP_STDDEV`. There is no stochastic
    depth.

    Attributes:
      depths: blocks of each stage.
      features: channels of each stage.
      patch_size: side of the square patches that the stem reads.
      mlp_ratio: hidden channels of each block, as a factor on its channels.
      layer_scale: what the factors on the result of each block start at.
      embedding_size: E of the projection; None leaves it out: E is the last of
        `features`.
      dtype: of the computation; parameters and embedding are float32.

    Raises:
      ValueError: if `depths` and `features` differ in length, or images are too small.
    """

    depths: Sequence[int] = (3, 3, 27, 3)
    features: Sequence[int] = (128, 256, 512, 1024)
    patch_size: int = 4
    mlp_ratio: float = 4.0
    layer_scale: float = 1e-6
    embedding_size: int | None = 640
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, E]."""
        self._check(images.shape)
        x = images
        for stage, channels in enumerate(self.features):
            if stage == 0:
                x = Patches(channels, self.patch_size, dtype=self.dtype, name="stem")(x)
                x = layer_norm(x, _EPSILON, self.dtype, "stem_norm")
            else:
                name = f"downsample_{stage}"
                x = layer_norm(x, _EPSILON, self.dtype, f"{name}_norm")
                x = Patches(channels, 2, dtype=self.dtype, name=name)(x)
            for index in range(self.depths[stage]):
                hidden, name = int(channels * self.mlp_ratio), f"stage_{stage}_{index}"
                x = Block(hidden, self.layer_scale, self.dtype, name=name)(x)
        x = x.astype(jnp.float32).mean((1, 2))
        x = layer_norm(x, _EPSILON, self.dtype, "norm")
        if self.embedding_size is not None:
            x = dense(self.embedding_size, self.dtype, "proj", use_bias=False)(x)
        return x.astype(jnp.float32)

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(self.depths) != len(self.features):
            raise ValueError(
                f"depths is {tuple(self.depths)}: it must have one value for each of"
                f" features, {tuple(self.features)}"
            )
        least = self.patch_size * 2 ** (len(self.features) - 1)
        if min(shape[1:3]) < least:
            raise ValueError(
                f"images are {shape[1]}x{shape[2]} pixels: they must be at least"
                f" {least}x{least}"
            )


class Block(nn.Module):
    """A depthwise 7x7 convolution, LayerNorm, an MLP with the exact GELU; added.

    Attributes:
      hidden: channels within the MLP.
      layer_scale: what the factor on each channel of the result starts at.
      dtype: of the computation; statistics are float32.
    """

    hidden: int
    layer_scale: float
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        channels = x.shape[-1]
        y = nn.Conv(
            channels,
            (7, 7),
            feature_group_count=channels,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            name="conv",
        )(x)
        y = layer_norm(y, _EPSILON, self.dtype, "norm")
        y = mlp(y, self.hidden, self.dtype)
        start = nn.initializers.constant(self.layer_scale)
        gamma = self.param("gamma", start, (channels,))
        return x + y * gamma[None, None, None].astype(self.dtype)
