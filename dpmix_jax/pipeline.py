"""What an experiment computes, put together from its config: model, sum, update."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.errors import FlaxError
from jax.sharding import NamedSharding, PartitionSpec

from dpmix_jax import (
    bank,
    finetune,
    ghost,
    gradients,
    mixup,
    models,
    performance,
    pretraining,
    privacy,
    sampling,
    training,
)
from dpmix_jax.config import ExperimentConfig
from dpmix_jax.data import Records
from dpmix_jax.errors import UserError

PyTree = Any

_MOST_IMAGES = 64  # about, in a microbatch whose memory does not grow with it
CLIPPED_GRADIENTS = {
    "instantiate": gradients.clipped_gradient,
    "ghost": ghost.ghost_clipped_gradient,
}


class Model:
    """A Flax model for the images of a dataset, as pure functions.

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
        blank = jnp.zeros((1, *records.image_shape), jnp.float32)
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
        # Read here, so that bad files are told before anything is written.
        self._given = config.finetune.load(collections)
        config.finetune.split(collections)

    def params(self, key: jax.Array) -> PyTree:
        """Draws parameters, but for those that come from files."""
        return jax.tree.map(
            lambda given, drawn: (
                drawn if isinstance(given, jax.ShapeDtypeStruct) else jnp.asarray(given)
            ),
            self._given,
            self.init(key),
        )

    def num_parameters(self) -> int:
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    def logits(self, params: PyTree, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, O], by all parameters, trained and frozen."""
        with self._precision():
            return self._module.apply(params, images)

    def is_head(self, trained: PyTree, frozen: PyTree) -> bool:
        """Whether these are a whole head, and the encoder that it classifies."""
        return (
            hasattr(self._module, "encode")
            and set(trained["params"]) == {"head"}
            and set(frozen["params"]) == {"encoder"}
        )

    @property
    def images_at_once(self) -> int | None:
        """Images that `encode` takes at a time here, or None for all."""
        on_cpu = jax.default_backend() == "cpu"
        return getattr(self._module, "CPU_IMAGES", None) if on_cpu else None

    def encode(self, params: PyTree, images: jax.Array) -> jax.Array:
        """[N, H, W, C] -> embeddings [N, E], without gradients in mind.

        Each is of its image alone whatever the model does, for under `jax.vmap` the
        model never sees two.
        """

        def embedding(image):
            with self._precision():
                return self._module.apply(params, image[None], method="encode")[0]

        encoded, size = jax.vmap(embedding), self.images_at_once
        if size is None or len(images) <= size:
            return encoded(images)
        whole = len(images) // size * size
        chunks = images[:whole].reshape(-1, size, *images.shape[1:])
        first = jax.lax.map(encoded, chunks).reshape(whole, -1)
        rest = [encoded(images[whole:])] if whole < len(images) else []
        return jnp.concatenate([first, *rest])

    def classify(self, params: PyTree, embeddings: jax.Array) -> jax.Array:
        """Embeddings [B, E] -> logits [B, O], by the parameters of the head."""
        with self._precision():
            return self._module.apply(
                params, embeddings, method=lambda module, x: module.head(x)
            )


class Pipeline:
    """The compiled parts of one run and its first state.

    Attributes:
      mesh: of all devices.
      record_set: from `augmentation_set`.
      accumulate: adds a microbatch to the sum over a batch.
      update: takes the sum to the next state.
      sensitivity: of the clipped sum, which the noise is scaled by.
      state: before the first update, of the parameters that are trained.

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
        self._config, self._num_records, self._seed = config, len(records), seed
        self._sampling_prob = mechanism.sampling_prob
        self.mesh = training.make_mesh()
        batch_size = config.privacy.expected_batch_size
        self.num_groups = config.method.num_groups(batch_size)

        params = model.params(sampling.stream_key(seed, "init"))
        trained, frozen = config.finetune.split(params)
        if frozen:  # the seed is forgotten, and released weights need these
            known = sampling.stream_key(0, "init")
            _, frozen = config.finetune.split(model.params(known))

        def loss_fn(params, images, labels, frozen):
            logits = model.logits(finetune.join(params, frozen), images)
            return optax.softmax_cross_entropy(logits, labels).mean()

        def head_loss_fn(params, embeddings, labels):
            logits = model.classify(params, embeddings)
            return optax.softmax_cross_entropy(logits, labels).mean()

        self._loss_fn, self._normalize = loss_fn, records.normalize
        is_head = bool(frozen) and model.is_head(trained, frozen)
        self._in_chunks = is_head and model.images_at_once is not None
        transform = CLIPPED_GRADIENTS[config.performance.clipping]
        gradient_fn = transform(
            head_loss_fn if is_head else loss_fn,
            l2_clip_norm=config.privacy.l2_clip_norm,
            convolutions=config.performance.convolutions,
        )
        if config.method.mixes_records:
            gradient_fn = gradients.with_shared_terms(gradient_fn)
            self.record_set = mixup.group_set(config.method, config.augmentation)
        else:
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
                draw=config.method.draw if config.method.num_public else "uniform",
            )
        self.accumulate = training.Accumulate(
            gradient_fn,
            self.record_set,
            records,
            self.mesh,
            key=sampling.stream_key(seed, "augmentation"),
            l2_clip_norm=config.privacy.l2_clip_norm,
            bank=drawn_from,
            frozen=frozen,
            encode=model.encode if is_head else None,
            on_device=config.performance.keeps_on_device(num_bytes, self.mesh.size),
        )
        self.sensitivity = gradient_fn.sensitivity(config.privacy.relation)
        optimizer = optax.chain(
            privacy.privatizer(
                gradient_fn,
                mechanism,
                expected_batch_size=self.num_groups or batch_size,
                key=sampling.stream_key(seed, "noise"),
            ),
            config.optimizer.build(),
        )
        self.update = training.make_update(
            optimizer, ema_decay=config.optimizer.ema_decay
        )
        self.state = training.init_state(trained, optimizer)

    def all_params(self, trained: PyTree) -> PyTree:
        """Returns parameters of the whole model, with what is frozen."""
        return finetune.join(trained, self.accumulate.frozen)

    def pretrain(
        self, state: training.TrainState
    ) -> Iterator[tuple[training.TrainState, jax.Array]]:
        """Goes on with `pretraining.pretrain` on the public images."""
        bank = self.accumulate.bank
        assert bank is not None  # the config has seen to it
        state = jax.device_put(state, NamedSharding(self.mesh, PartitionSpec()))
        return pretraining.pretrain(
            state,
            self._loss_fn,
            self._config.pretrain,
            self._config.augmentation,
            bank,
            frozen=self.accumulate.frozen,
            normalize=self._normalize,
            key=sampling.stream_key(self._seed, "pretraining"),
        )

    def bytes_needed(self, microbatch_size: int) -> int:
        """Returns the memory of one device that a microbatch takes."""
        return self.accumulate.bytes_needed(
            self.state.params, self.blank_microbatch(microbatch_size)
        )

    def blank_microbatch(self, microbatch_size: int) -> np.ndarray:
        """Returns indices of nothing, of the shape that a microbatch usually has."""
        if self.num_groups is None:
            return np.full(microbatch_size, -1)
        groups = sampling.groups_at_once(
            microbatch_size, self._capacity, self.mesh.size
        )
        return np.full((groups, self._capacity), -1)

    @property
    def _capacity(self) -> int:
        """Places of a large group, or 1 without groups."""
        if self.num_groups is None:
            return 1
        return sampling.group_capacity(2 * self._config.method.group_size)

    def batches(self, microbatch_size: int) -> Callable[[int], list[np.ndarray]]:
        """Returns the function from an update to its microbatches."""
        return sampling.batches(
            self._seed,
            num_records=self._num_records,
            sampling_prob=self._sampling_prob,
            microbatch_size=microbatch_size,
            num_groups=self.num_groups,
            num_devices=self.mesh.size,
        )

    def microbatch_size(self) -> int:
        """Returns the size that the config gives, or the largest that fits."""
        size = self._config.performance.microbatch_size
        if size != "auto":
            return int(size)
        most = self._config.privacy.expected_batch_size
        if self._in_chunks:  # memory would allow hours without a stop
            most = max(1, _MOST_IMAGES // self._config.method.set_size)
        return performance.largest_microbatch(
            self.bytes_needed,
            expected_batch_size=most,
            num_devices=self.mesh.size,
            step=self._capacity,
            memory_gib=self._config.performance.memory_gib,
        )
