"""Initial weights from public images: training without noise, before the private one.

The DP-Mix poster compares it with mixing the same images in: it did not help there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpmix_jax import augment, sampling, training
from dpmix_jax.errors import require
from dpmix_jax.pool import Pool

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """SGD on the public images, one flipped and cropped view of each.

    Attributes:
      num_updates: 0 for none.
      batch_size: images of an update, drawn uniformly from the pool.
      learning_rate: positive, constant.
      momentum: in [0, 1).
    """

    num_updates: int = 0
    batch_size: int = 256
    learning_rate: float = 0.1
    momentum: float = 0.9

    def __post_init__(self):
        for name, least in (("num_updates", 0), ("batch_size", 1)):
            size = getattr(self, name)
            require(size >= least, f"pretrain.{name}", size, f"at least {least}")
        rate, momentum = self.learning_rate, self.momentum
        finite = 0 < rate < math.inf
        require(finite, "pretrain.learning_rate", rate, "positive and finite")
        require(0 <= momentum < 1, "pretrain.momentum", momentum, "in [0, 1)")

    def build(self) -> optax.GradientTransformation:
        return optax.sgd(self.learning_rate, self.momentum or None)


def pretrain(
    state: training.TrainState,
    loss_fn: Callable[..., jax.Array],
    config: PretrainConfig,
    augmentation: augment.AugmentationConfig,
    pool: Pool,
    *,
    constants: tuple[PyTree, ...] = (),
    normalize: Callable[[jax.Array], jax.Array],
    key: jax.Array,
) -> Iterator[tuple[training.TrainState, jax.Array]]:
    """Yields (state, loss of its batch) after each update still to be done.

    Formal guarantees:
      - The weights depend on the first ones, the pool and the key alone.

    Args:
      state: `training.init_state` with the optimizer of `config.build()`, or that of a
        checkpoint: updates are a pure function of it and of the key.
      loss_fn: `f(params, images [B, H, W, C], labels [B, O]) -> scalar`, and
        then the constants.
      config: how long and how fast.
      augmentation: how a view is drawn.
      pool: the public images.
      constants: what the loss takes after the labels and is not trained.
      normalize: brings images to the scale that the loss expects.
      key: scalar key, of a stream that nothing private is drawn from.
    """
    update = training.make_update(config.build(), ema_decay=0.0)
    num_classes = pool.ends.shape[0] - 1
    # An argument, no constant: compiled code is cached on disk.
    words = np.asarray(jax.random.key_data(key))

    @jax.jit
    def gradient(params, constants, step, pool, words):
        key = jax.random.fold_in(sampling.threefry_key(words), step)
        row_key, view_key = jax.random.split(key)
        rows = jax.random.randint(
            row_key, (config.batch_size,), 0, pool.labels.shape[0]
        )
        images = normalize(jnp.take(pool.images, rows, axis=0, mode="clip"))
        view = functools.partial(augment.random_view, augmentation=augmentation)
        keys = jax.random.split(view_key, config.batch_size)
        views = jax.vmap(view)(keys, images)
        labels = jnp.take(pool.labels, rows, mode="clip")
        targets = jax.nn.one_hot(labels, num_classes, dtype=views.dtype)
        return jax.value_and_grad(loss_fn)(params, views, targets, *constants)

    for _ in range(int(state.step), config.num_updates):
        loss, gradients = gradient(state.params, constants, state.step, pool, words)
        state = update(state, gradients)
        yield state, loss
