"""A tiny convolutional classifier in plain JAX, and data for it."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpmix_jax import MethodConfig, Pool, make_pool
from dpmix_jax.data import Records
from dpmix_jax.mixup import METHODS

NUM_CLASSES = 3


def init_params(seed: int = 0):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.normal(size=(3, 3, 1, 4)), jnp.float32),
        "dense": jnp.asarray(rng.normal(size=(4, NUM_CLASSES)), jnp.float32),
    }


def logits_fn(params, images):
    x = jax.lax.conv_general_dilated(
        images,
        params["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jnp.tanh(x).mean(axis=(1, 2)) @ params["dense"]


def loss_fn(params, images, labels):
    """Mean loss over the K images of one record."""
    return optax.softmax_cross_entropy(logits_fn(params, images), labels).mean()


def records(num: int, seed: int = 0, size: int = 6) -> Records:
    rng = np.random.default_rng(seed)
    return Records(
        images=rng.integers(0, 256, (num, size, size, 1)).astype(np.uint8),
        labels=rng.integers(0, NUM_CLASSES, num).astype(np.int32),
        class_names=("a", "b", "c"),
        mean=(0.5,),
        stddev=(0.25,),
    )


def pool(num: int = 7, seed: int = 1, draw: str = "uniform") -> Pool:
    """Public images like `records`, uint8, every class among them."""
    found = records(num, seed)
    labels = np.arange(num) % NUM_CLASSES
    return make_pool(found.images, labels, found.class_names, draw=draw)


def method(name: str, **options) -> MethodConfig:
    """A method with small sizes, of the kinds that it has."""
    kinds = zip(("k_base", "k_diff", "k_self"), METHODS[name], strict=True)
    small = {"k_base": 3, "k_diff": 2, "k_self": 2}
    return MethodConfig(
        name=name, **{kind: small[kind] for kind, size in kinds if size} | options
    )


def flat(tree) -> np.ndarray:
    return np.concatenate(
        [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    )


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects an entry for each compilation from now on."""
    compiled: list[str] = []

    def listen(event, duration, **kwargs):
        del duration, kwargs
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.clear_event_listeners()
