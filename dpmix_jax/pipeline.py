"""What an experiment computes, put together from its config: model, sum, update."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.errors import FlaxError

from dpmix_jax import (
    bank,
    ghost,
    gradients,
    mixup,
    models,
    performance,
    privacy,
    sampling,
    training,
)
from dpmix_jax.config import ExperimentConfig
from dpmix_jax.data import Records
from dpmix_jax.errors import UserError

PyTree = Any

CLIPPED_GRADIENTS = {
    "instantiate": gradients.clipped_gradient,
    "ghost": ghost.ghost_clipped_gradient,
}


class Model:
    """A Flax model for the images of a dataset, as two pure functions.

    Raises:
      UserError: for options that do not fit the images, or a model that keeps anything
        but parameters, such as BatchNorm's statistics.
    """

    def __init__(self, config: ExperimentConfig, records: Records):
        module = models.create(
            config.model.name,
            records.num_classes,
            dtype=config.performance.dtype,
            **config.model.options,
        )
        self._precision = config.performance.matmul_precision
        blank = jnp.zeros((1, *records.images.shape[1:]), jnp.float32)
        self.init = jax.jit(lambda key: module.init(key, blank))
        try:
            collections = jax.eval_shape(self.init, jax.random.key(0))
            extra = sorted(set(collections) - {"params"})
            if not extra:
                jax.eval_shape(module.apply, collections, blank)
        except (ValueError, TypeError, ZeroDivisionError, FlaxError) as error:
            raise UserError(
                f"model {config.model.name!r} with options {config.model.options} does"
                f" not fit images of {blank.shape[1:]}: {error}"
            ) from None
        if extra:
            raise UserError(
                f"model {config.model.name!r} keeps {', '.join(extra)}: statistics of a"
                " batch mix records, so that none has a gradient of its own; use"
                " GroupNorm or LayerNorm"
            )
        self._module: Any = module

    def num_parameters(self) -> int:
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    def logits(self, params: PyTree, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, O]."""
        with self._precision():
            return self._module.apply(params, images)


class Pipeline:
    """The compiled parts of one run and its first state.

    Attributes:
      mesh: of all devices.
      record_set: from `augmentation_set`.
      accumulate: adds a microbatch to the sum over a batch.
      update: takes the sum to the next state.
      state: before the first update.

    Args:
      config: of the experiment.
      model: of that config.
      records: the training set.
      mechanism: says how much noise.
      seed: of the run.
      public: public images, for a method that draws some.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model: Model,
        records: Records,
        *,
        mechanism: privacy.Mechanism,
        seed: int,
        public: Records | None = None,
    ):
        self._config = config
        self.mesh = training.make_mesh()

        def loss_fn(params, images, labels):
            logits = model.logits(params, images)
            return optax.softmax_cross_entropy(logits, labels).mean()

        transform = CLIPPED_GRADIENTS[config.performance.clipping]
        gradient_fn = transform(
            loss_fn,
            l2_clip_norm=config.privacy.l2_clip_norm,
            convolutions=config.performance.convolutions,
        )
        self.record_set = mixup.augmentation_set(
            config.method, config.augmentation, normalize=records.normalize
        )
        drawn_from, num_bytes = None, records.images.nbytes
        if public is not None:
            num_bytes += public.images.nbytes
            drawn_from = bank.make_bank(
                public.images,
                public.labels,
                public.class_names,
                draw=config.method.draw,
            )
        self.accumulate = training.Accumulate(
            gradient_fn,
            self.record_set,
            records,
            self.mesh,
            key=sampling.stream_key(seed, "augmentation"),
            l2_clip_norm=config.privacy.l2_clip_norm,
            bank=drawn_from,
            on_device=config.performance.keeps_on_device(num_bytes, self.mesh.size),
        )
        optimizer = optax.chain(
            privacy.privatizer(
                gradient_fn,
                mechanism,
                expected_batch_size=config.privacy.expected_batch_size,
                key=sampling.stream_key(seed, "noise"),
            ),
            config.optimizer.build(),
        )
        self.update = training.make_update(
            optimizer, ema_decay=config.optimizer.ema_decay
        )
        params = model.init(sampling.stream_key(seed, "init"))
        self.state = training.init_state(params, optimizer)

    def bytes_needed(self, microbatch_size: int) -> int:
        """Returns the memory of one device that a microbatch takes."""
        return self.accumulate.bytes_needed(self.state.params, microbatch_size)

    def microbatch_size(self) -> int:
        """Returns the size that the config gives, or the largest that fits."""
        size = self._config.performance.microbatch_size
        if size != "auto":
            return int(size)
        return performance.largest_microbatch(
            self.bytes_needed,
            expected_batch_size=self._config.privacy.expected_batch_size,
            num_devices=self.mesh.size,
            memory_gib=self._config.performance.memory_gib,
        )
