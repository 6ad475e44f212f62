"""Models by name. Any Flax Linen module without batch statistics can be added here."""

import dataclasses
from collections.abc import Callable

from flax import linen as nn

from dpmix_jax.errors import UserError, require_one_of
from dpmix_jax.models.cnn import CNN
from dpmix_jax.models.convnext import ConvNeXt
from dpmix_jax.models.layers import EncoderAndHead, LinearHead
from dpmix_jax.models.scattering import Scattering, ScatteringCNN
from dpmix_jax.models.vit import VisionTransformer
from dpmix_jax.models.whitening import Whitening
from dpmix_jax.models.wrn import WideResNet

# A class with `num_classes` maps images to logits. A class without maps images to
# embeddings, and gets the head of `HEADS`, or else a linear one.
REGISTRY: dict[str, type[nn.Module]] = {
    "cnn": CNN,
    "convnext": ConvNeXt,
    "scattering_cnn": Scattering,
    "scattering_linear": Scattering,
    "vit": VisionTransformer,
    "wrn": WideResNet,
}
HEADS: dict[str, type[nn.Module]] = {"scattering_cnn": ScatteringCNN}


def options(name: str) -> tuple[str, ...]:
    """Returns the names of the options of a model, or raises `UserError`."""
    given = ("parent", "name", "num_classes", "dtype")
    fields = [*_fields(_model(name)), *(_fields(HEADS[name]) if name in HEADS else ())]
    return tuple(dict.fromkeys(field for field in fields if field not in given))


def create(
    name: str, num_classes: int | None, *, whitening: bool = False, **kwargs
) -> nn.Module:
    """Builds a model: float images [B, H, W, C] -> logits [B, num_classes].

    Args:
      name: of `REGISTRY`.
      num_classes: O; None for an encoder without a head, which returns embeddings.
      whitening: whether embeddings are whitened before the head, see
        `whitening.Whitening`.
      **kwargs: options of the model, and the `dtype` of its computation.

    Raises:
      UserError: for a name that no model has, or for the whitening of a model without
        an encoder, or with a head that needs the encoder's grid.
    """
    model = _model(name)
    if whitening and ("num_classes" in _fields(model) or name in HEADS):
        raise UserError(
            "finetune.whitening is set: it must be None for a model without an encoder"
            f" and a linear head, such as {name}"
        )
    if "num_classes" in _fields(model):
        return model(num_classes=num_classes, **kwargs)
    names = _fields(HEADS[name]) if name in HEADS else ()
    of_head = {k: value for k, value in kwargs.items() if k in names}
    both = {*_fields(model)} & {*names}
    of_encoder = {
        k: value for k, value in kwargs.items() if k in both or k not in names
    }
    make: Callable[..., nn.Module] = HEADS.get(name, LinearHead)
    head = None if num_classes is None else make(num_classes, **of_head)
    return EncoderAndHead(model(**of_encoder), head, Whitening() if whitening else None)


def _model(name: str) -> type[nn.Module]:
    require_one_of("model.name", name, sorted(REGISTRY))
    return REGISTRY[name]


def _fields(module: type[nn.Module]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(module))
