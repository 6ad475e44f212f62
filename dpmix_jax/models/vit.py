"""The image tower of CLIP: a vision transformer, with a linear head."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpmix_jax.models.norm import LayerNorm
from dpmix_jax.models.patches import Patches

_INIT = nn.initializers.normal(0.02)
_EPSILON = 1e-5


class VisionTransformer(nn.Module):
    """ViT-B/16 as open_clip builds it (Radford et al., 2021), and a linear head.

    Parameters are `{"encoder": ..., "head": ...}`. `pretrained.load_encoder` reads
    weights for the first; without it, `encode` can be applied alone. The head starts
    at zero, as is usual for linear probes: all classes are equally likely, and its
    first gradient does not depend on chance.

    The defaults are those of open_clip's `ViT-B-16`: 86.2 million parameters, images of
    224x224 pixels normalised by `images.CLIP_MEAN` and `images.CLIP_STDDEV`.

    Attributes:
      num_classes: O; None leaves the head out, the result is the embedding.
      patch_size: side of the square patches; it must divide height and width. Positions
        are those of the first images, others must have their size.
      width: channels of each token.
      depth: blocks.
      heads: of the attention; they must divide the width.
      mlp_ratio: hidden channels of each block, as a factor on the width.
      embedding_size: E of the projection; None leaves it out: E is the width.
      dtype: of the computation; parameters, embedding and logits are float32.
    """

    # More images at a time leave a CPU's caches: 64 take 1.5 times as long each.
    CPU_IMAGES: ClassVar[int | None] = 2

    num_classes: int | None = None
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    embedding_size: int | None = 512
    dtype: jax.typing.DTypeLike = jnp.float32

    def setup(self):
        self.encoder = ViTEncoder(
            patch_size=self.patch_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            embedding_size=self.embedding_size,
            dtype=self.dtype,
        )
        if self.num_classes is not None:
            self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> logits [B, O], or embeddings [B, E] without classes."""
        embedding = self.encode(images)
        return embedding if self.num_classes is None else self.head(embedding)

    def encode(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> embeddings [B, E], not normalised."""
        return self.encoder(images)


class ViTEncoder(nn.Module):
    """From images to embeddings; attributes are those of `VisionTransformer`.

    Raises:
      ValueError: for images that are not made of whole patches, or heads that do not
        divide the width.
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    embedding_size: int | None
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, E]."""
        self._check(images.shape)
        batch, at_random = images.shape[0], nn.initializers.normal(self.width**-0.5)
        first = self.param("class_embedding", at_random, (self.width,))
        x = Patches(
            self.width,
            self.patch_size,
            use_bias=False,
            dtype=self.dtype,
            name="patches",
        )(images).reshape(batch, -1, self.width)
        first = jnp.broadcast_to(first.astype(self.dtype), (batch, 1, self.width))
        x = jnp.concatenate([first, x], axis=1)
        positions = self.param("positional_embedding", at_random, x.shape[1:])
        x = LayerNorm(_EPSILON, self.dtype, name="ln_pre")(
            x + positions[None].astype(self.dtype)
        )
        for index in range(self.depth):
            hidden = int(self.width * self.mlp_ratio)
            x = Block(self.heads, hidden, self.dtype, name=f"block_{index}")(x)
        x = LayerNorm(_EPSILON, self.dtype, name="ln_post")(x[:, 0])
        if self.embedding_size is not None:
            x = nn.Dense(
                self.embedding_size,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=at_random,
                name="proj",
            )(x)
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
        x = x + self._attention(LayerNorm(_EPSILON, self.dtype, name="norm1")(x))
        y = self._dense(self.hidden, "fc1")(
            LayerNorm(_EPSILON, self.dtype, name="norm2")(x)
        )
        return x + self._dense(x.shape[-1], "fc2")(nn.gelu(y, approximate=False))

    def _attention(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = self._dense(3 * width, "qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        query = query * (width // self.heads) ** -0.5
        scores = jnp.einsum("bthd,bshd->bhts", query, key)
        weights = nn.softmax(scores.astype(jnp.float32)).astype(self.dtype)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, value)
        return self._dense(width, "out")(mixed.reshape(batch, tokens, width))

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, kernel_init=_INIT, name=name)
