"""Models by name. Any Flax Linen module without batch statistics can be added here."""

import dataclasses

from flax import linen as nn

from dpmix_jax.errors import UserError
from dpmix_jax.models.cnn import CNN
from dpmix_jax.models.convnext import ConvNeXt
from dpmix_jax.models.layers import EncoderAndHead
from dpmix_jax.models.vit import VisionTransformer
from dpmix_jax.models.wrn import WideResNet

# A class with `num_classes` maps images to logits. A class without maps images to
# embeddings, and gets a linear head.
REGISTRY: dict[str, type[nn.Module]] = {
    "cnn": CNN,
    "convnext": ConvNeXt,
    "vit": VisionTransformer,
    "wrn": WideResNet,
}


def options(name: str) -> tuple[str, ...]:
    """Returns the names of the options of a model, or raises `UserError`."""
    given = ("parent", "name", "num_classes", "dtype")
    return tuple(field for field in _fields(name) if field not in given)


def create(name: str, num_classes: int | None, **kwargs) -> nn.Module:
    """Builds a model: float images [B, H, W, C] -> logits [B, num_classes].

    Args:
      name: of `REGISTRY`.
      num_classes: O; None for an encoder without a head, which returns embeddings.
      **kwargs: options of the model, and the `dtype` of its computation.

    Raises:
      UserError: for a name that no model has.
    """
    if "num_classes" in _fields(name):
        return REGISTRY[name](num_classes=num_classes, **kwargs)
    return EncoderAndHead(REGISTRY[name](**kwargs), num_classes)


def _fields(name: str) -> tuple[str, ...]:
    if name not in REGISTRY:
        raise UserError(
            f"model.name is {name!r}: it must be one of {', '.join(sorted(REGISTRY))}"
        )
    return tuple(field.name for field in dataclasses.fields(REGISTRY[name]))
