"""A Flax model as pure functions of its parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.errors import FlaxError

from dpmix_jax import models
from dpmix_jax.errors import UserError

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """What a run needs of a model.

    Attributes:
      shapes: `{"params": ...}` of `jax.ShapeDtypeStruct`.
      init: `f(key) -> params`.
      logits: `f(params, images [B, H, W, C]) -> [B, O]`.
      encode: `f(params, images [N, H, W, C]) -> embeddings [N, ...]`, each of its
        image alone, or None for a model without an encoder and a head.
      classify: `f(params, embeddings [B, ...]) -> [B, O]`, by the head alone; the
        embeddings may be flat, [B, E].
      cpu_images: how many images `encode` takes at a time where it is compiled for a
        CPU, or None for all.
    """

    shapes: PyTree
    init: Callable[[jax.Array], PyTree]
    logits: Callable[[PyTree, jax.Array], jax.Array]
    encode: Callable[[PyTree, jax.Array], jax.Array] | None
    classify: Callable[[PyTree, jax.Array], jax.Array]
    cpu_images: int | None


def make_classifier(
    name: str,
    options: Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    whitening: bool = False,
    dtype: jax.typing.DTypeLike = jnp.float32,
    matmul_precision: str = "float32",
) -> Classifier:
    """Builds a model for images of one shape.

    Args:
      name: of `models.REGISTRY`.
      options: of that model.
      image_shape: H, W, C.
      num_classes: O.
      whitening: whether embeddings are whitened before the head.
      dtype: of the computation; parameters are float32.
      matmul_precision: of float32 products, which accelerators lower if not told.

    Raises:
      UserError: for options that do not fit the images, or a model that keeps anything
        but parameters, such as BatchNorm's statistics.
    """
    module: Any = models.create(
        name, num_classes, whitening=whitening, dtype=dtype, **options
    )
    blank = jnp.zeros((1, *image_shape), jnp.float32)

    def apply(params, inputs, **kwargs):
        with jax.default_matmul_precision(matmul_precision):
            return module.apply(params, inputs, **kwargs)

    init = jax.jit(lambda key: module.init(key, blank))
    try:
        shapes = jax.eval_shape(init, jax.random.key(0))
        extra = sorted(set(shapes) - {"params"})
        if not extra:
            jax.eval_shape(apply, shapes, blank)
    except (ValueError, TypeError, ZeroDivisionError, FlaxError) as error:
        raise UserError(
            f"model {name!r} with options {dict(options)} does not fit images of"
            f" {image_shape}: {error}"
        ) from None
    if extra:
        raise UserError(
            f"model {name!r} keeps {', '.join(extra)}: statistics of a batch mix"
            " records, so that none has a gradient of its own; use GroupNorm or"
            " LayerNorm"
        )
    cpu_images = getattr(module, "CPU_IMAGES", None)

    def of_one(method):
        return lambda params, x: apply(params, x[None], method=method)[0]

    def encode(params, images):
        embed = _in_chunks(of_one(lambda model, x: model.encoder(x)), cpu_images)
        # Whitening has no need of small chunks, which would make it slow.
        whiten = _in_chunks(of_one(lambda model, x: model.whiten(x)), None)
        return whiten(params, embed(params, images))

    # An `EncoderAndHead`, or what is like it.
    encodes = hasattr(module, "encoder") and callable(getattr(module, "whiten", None))
    shape = jax.eval_shape(encode, shapes, blank).shape[1:] if encodes else ()

    def classify(params, embeddings):
        embeddings = embeddings.reshape(len(embeddings), *shape)
        return apply(params, embeddings, method=lambda model, x: model.head(x))

    return Classifier(
        shapes=shapes,
        init=init,
        logits=apply,
        encode=encode if encodes else None,
        classify=classify,
        cpu_images=cpu_images,
    )


def _in_chunks(
    function: Callable[[PyTree, jax.Array], jax.Array], size: int | None
) -> Callable[[PyTree, jax.Array], jax.Array]:
    """Maps a function of one image over images [N, ...], on CPUs `size` at a time.

    Under `jax.vmap` the model never sees two images, so that each embedding is of its
    image alone whatever the model does.
    """

    of_each = jax.vmap(function, (None, 0))
    if size is None:
        return of_each

    def of_chunks(params, images):
        whole = len(images) // size * size
        chunks = images[:whole].reshape(-1, size, *images.shape[1:])
        first = jax.lax.map(lambda chunk: of_each(params, chunk), chunks)
        first = first.reshape(whole, *first.shape[2:])
        rest = [of_each(params, images[whole:])] if whole < len(images) else []
        return jnp.concatenate([first, *rest])

    def mapped(params, images):
        if len(images) <= size:
            return of_each(params, images)
        return jax.lax.platform_dependent(
            params, images, cpu=of_chunks, default=of_each
        )

    return mapped
