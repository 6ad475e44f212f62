"""Models by name. Any Flax Linen module without batch statistics can be added here.

One with parameters `encoder` and `head` and a method `encode` must compute
`head(encode(images))`: where only the head is trained, embeddings are made first.
"""

import dataclasses

from flax import linen as nn

from dpmix_jax.errors import UserError
from dpmix_jax.models.cnn import CNN
from dpmix_jax.models.convnext import ConvNeXt
from dpmix_jax.models.vit import VisionTransformer
from dpmix_jax.models.wrn import WideResNet

REGISTRY: dict[str, type[nn.Module]] = {
    "cnn": CNN,
    "convnext": ConvNeXt,
    "vit": VisionTransformer,
    "wrn": WideResNet,
}


def options(name: str) -> tuple[str, ...]:
    """Returns the names of the options of a model, or raises `UserError`."""
    if name not in REGISTRY:
        raise UserError(
            f"model.name is {name!r}: it must be one of {', '.join(sorted(REGISTRY))}"
        )
    fields = dataclasses.fields(REGISTRY[name])
    return tuple(
        f.name
        for f in fields
        if f.name not in ("parent", "name", "num_classes", "dtype")
    )


def create(name: str, num_classes: int, **kwargs) -> nn.Module:
    """Builds a model: float images [B, H, W, C] -> logits [B, num_classes]."""
    options(name)
    return REGISTRY[name](num_classes=num_classes, **kwargs)
