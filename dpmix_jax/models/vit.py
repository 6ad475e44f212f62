"""The image tower of CLIP as a vision transformer."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpmix_jax.models.layers import Patches, dense, layer_norm, mlp

_EPSILON = 1e-5


class VisionTransformer(nn.Module):
    """ViT-B/16 as open_clip builds it (Radford et al., 2021): images to embeddings.

    The defaults are those of open_clip's `ViT-B-16`: 86.2 million parameters, images of
    224x224 pixels normalised by `images.CLIP_MEAN` and `images.CLIP_STDDEV`.

    Attributes:
      patch_size: side of the square patches; it must divide height and width. Positions
        are those of the first images, others must have their size.
      width: channels of each token.
      depth: blocks.
      heads: of the attention; they must divide the width.
      mlp_ratio: hidden channels of each block, as a factor on the width.
      embedding_size: E of the projection; None leaves it out: E is the width.
      dtype: of the computation; parameters and embedding are float32.

    Raises:
      ValueError: for images that are not made of whole patches, or heads that do not
        divide the width.
    """

    # More images at a time leave a CPU's caches: 64 take 1.5 times as long each.
    CPU_IMAGES: ClassVar[int | None] = 2

    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    embedding_size: int | None = 512
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, E]."""
        self._check(images.shape)
        batch, stddev = images.shape[0], self.width**-0.5
        at_random = nn.initializers.normal(stddev)
        first = self.param("class_embedding", at_random, (self.width,))
        patches = Patches(
            self.width, self.patch_size, False, self.dtype, name="patches"
        )
        x = patches(images).reshape(batch, -1, self.width)
        first = jnp.broadcast_to(first.astype(self.dtype), (batch, 1, self.width))
        x = jnp.concatenate([first, x], axis=1)
        positions = self.param("positional_embedding", at_random, x.shape[1:])
        x = x + positions[None].astype(self.dtype)
        x = layer_norm(x, _EPSILON, self.dtype, "ln_pre")
        for index in range(self.depth):
            hidden = int(self.width * self.mlp_ratio)
            x = Block(self.heads, hidden, self.dtype, name=f"block_{index}")(x)
        x = layer_norm(x[:, 0], _EPSILON, self.dtype, "ln_post")
        if self.embedding_size is not None:
            x = dense(self.embedding_size, self.dtype, "proj", stddev, use_bias=False)(
                x
            )
        return x.astype(jnp.float32)

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape[1] % self.patch_size or shape[2] % self.patch_size:
            raise ValueError(
                f"patch_size is {self.patch_size}: it must divide images of"
                f" {shape[1]}x{shape[2]} pixels"
            )
        if self.width % self.heads:
            raise ValueError(
                f"heads is {self.heads}: it must divide the width, {self.width}"
            )


class Block(nn.Module):
    """Attention, then an MLP with the exact GELU, each after a LayerNorm and added.

    Attributes:
      heads: of the attention.
      hidden: channels within the MLP.
      dtype: of the computation; statistics and softmax are float32.
    """

    heads: int
    hidden: int
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, width] -> [B, T, width]."""
        x = x + self._attention(layer_norm(x, _EPSILON, self.dtype, "norm1"))
        y = layer_norm(x, _EPSILON, self.dtype, "norm2")
        return x + mlp(y, self.hidden, self.dtype)

    def _attention(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = dense(3 * width, self.dtype, "qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        query = query * (width // self.heads) ** -0.5
        scores = jnp.einsum("bthd,bshd->bhts", query, key)
        weights = nn.softmax(scores.astype(jnp.float32)).astype(self.dtype)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, value)
        return dense(width, self.dtype, "out")(mixed.reshape(batch, tokens, width))
