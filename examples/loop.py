"""Private training of any loss of one record: the loop that the examples share.

`loss_fn(params, images [K, H, W, C], labels [K, O])` is the mean over the images of one
record; `params` is any pytree of arrays, of whatever model library.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dpmix_jax as dpm
from dpmix_jax import data

METHOD = dpm.MethodConfig(name="dp_mix_self", k_base=4, k_self=4)
AUGMENTATION = dpm.AugmentationConfig(flip=False, max_shift=0.5, subpixel=True)


def digits() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns images [N, 8, 8, 1] and labels [N, 10], and the same of test records."""
    found = data.load(data.DataConfig(name="digits"))
    return tuple(
        array
        for part in (found.train, found.test)
        for array in (
            part.normalize(jnp.asarray(part.images)),
            jax.nn.one_hot(part.labels, 10),
        )
    )


def accuracy(logits: jax.Array, labels: jax.Array) -> str:
    """Says how many test records are classified correctly."""
    share = (logits.argmax(axis=1) == labels.argmax(axis=1)).mean()
    return f"test accuracy {100 * share:.1f} %"


def train_privately(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    *,
    seed: int,
    epsilon: float = 3.0,
    delta: float = 1e-5,
    q: float = 0.15,
    num_updates: int = 60,
    learning_rate: float = 1.0,
) -> Any:
    """Returns the parameters after T updates, which are (epsilon, delta)-DP."""
    mechanism = dpm.calibrate(
        epsilon=epsilon, delta=delta, sampling_prob=q, num_updates=num_updates
    )
    gradient_fn = dpm.clipped_gradient(loss_fn, l2_clip_norm=1.0)
    record_set = dpm.augmentation_set(METHOD, AUGMENTATION)
    noise = dpm.privatizer(
        gradient_fn,
        mechanism,
        expected_batch_size=q * len(images),
        key=dpm.noise_key(seed),
    )
    optimizer = optax.chain(noise, optax.sgd(learning_rate))
    batches = dpm.batches(
        seed, num_records=len(images), sampling_prob=q, microbatch_size=64
    )

    @jax.jit
    def add(total, params, step, indices, is_padding, images, labels):
        keys = dpm.record_keys(dpm.stream_key(seed, "augmentation"), step, indices)
        sets = jax.vmap(record_set)(keys, images[indices], labels[indices])
        part, _ = gradient_fn(params, *sets, is_padding_example=is_padding)
        return jax.tree.map(jnp.add, total, part)

    state = optimizer.init(params)
    for step in range(num_updates):
        total = jax.tree.map(jnp.zeros_like, params)
        for batch in batches(step):
            drawn = batch.data, batch.mask
            total = add(total, params, step, *drawn, images, labels)
        updates, state = optimizer.update(total, state)
        params = optax.apply_updates(params, updates)
    print(f"({mechanism.epsilon(delta):.3f}, {delta})-DP")
    return params
