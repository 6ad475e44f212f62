"""From a config to what a run computes: terms, their sum, the update, the state."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_privacy import clipping

from dpmix_jax import (
    accounting,
    conv,
    devices,
    ghost,
    gradients,
    mixup,
    pool,
    privacy,
    sampling,
    training,
)
from dpmix_jax.baselines import microbatch_mixup
from dpmix_jax.data import Records
from dpmix_jax.models import finetune
from dpmix_jax.models.classifier import Classifier, make_classifier
from dpmix_jax.run import performance
from dpmix_jax.run.config import ExperimentConfig

PyTree = Any
Indices = Callable[[int], list[np.ndarray]]

_MOST_IMAGES = 64  # about, in a microbatch of images that are embedded in chunks
CLIPPED_GRADIENTS = {
    "instantiate": gradients.clipped_gradient,
    "ghost": ghost.ghost_clipped_gradient,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """How the records of a batch become the terms of its sum.

    Attributes:
      expected: expected number of terms of a batch, by which the sum is divided.
      indices: `f(microbatch size)` returns the function from an update to the indices
        of its microbatches.
      padding: `f(microbatch size)` returns the indices of a microbatch of padding.
      least: the fewest records that a device can take at a time.
    """

    expected: float
    indices: Callable[[int], Indices]
    padding: Callable[[int], np.ndarray]
    least: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run computes with: compiled functions, and arrays on the devices.

    Attributes:
      mesh: of all devices.
      terms: see `Terms`.
      inputs: what stays on the devices.
      host_records: images and labels of a training set that stays on the host, or ().
      sets: makes the augmentation sets of a microbatch.
      gradient_fn: the clipped sum over sets, with its sensitivity.
      accumulate: adds a microbatch to the sums of its batch.
      accumulate_by: makes it anew with another formulation of its convolutions.
      apply_update: takes the sum to the next state.
      state: before the first update, of the parameters that are trained.
      frozen: the parameters that are not.
      loss_fn: `f(params, images, labels, *inputs.constants)`, of a record's images or
        of public ones.
      expected_records: of a batch; a larger microbatch would be padding.
      clipping: what `performance.clipping` comes to.
      magnitudes: whether those of gradients are added up too.
    """

    mesh: jax.sharding.Mesh
    terms: Terms
    inputs: training.Inputs
    host_records: tuple[np.ndarray, ...]
    sets: training.MakeSets
    gradient_fn: clipping.BoundedSensitivityCallable
    accumulate: Any
    accumulate_by: Callable[[conv.Formulation], Any]
    apply_update: Callable[[training.TrainState, PyTree], training.TrainState]
    state: training.TrainState
    frozen: PyTree
    loss_fn: Callable[..., jax.Array]
    expected_records: float
    clipping: str
    magnitudes: bool

    def all_params(self, trained: PyTree) -> PyTree:
        """Returns parameters of the whole model, with what is frozen."""
        return finetune.join(trained, self.frozen)

    def released(self, trained: PyTree) -> PyTree:
        """Returns the parameters that a file of weights must hold."""
        return finetune.released(trained, self.frozen)

    def put(self, indices: np.ndarray) -> training.Batch:
        return training.put_batch(indices, self.mesh, self.host_records)

    def init_sums(self) -> training.Sums:
        """Returns zeros for `accumulate` to add to."""
        return training.init_sums(
            self.state.params, self.mesh, magnitudes=self.magnitudes
        )

    def batches(
        self, microbatch_size: int
    ) -> Callable[[int], Iterable[training.Batch]]:
        """Returns the function from an update to its microbatches on the devices."""
        indices = self.terms.indices(microbatch_size)
        return lambda step: devices.ahead(self.put, indices(step))

    def arguments(self, microbatch_size: int) -> tuple[Any, ...]:
        """Returns what `accumulate` takes, with a microbatch of padding."""
        return (
            self.init_sums(),
            self.state.params,
            self.state.step,
            self.put(self.terms.padding(microbatch_size)),
            self.inputs,
        )

    def bytes_needed(self, microbatch_size: int) -> int:
        """Returns the memory of one device that a microbatch takes, by compiling it."""
        return num_bytes(self._compiled(microbatch_size))

    def _compiled(self, microbatch_size: int) -> jax.stages.Compiled:
        arguments = self.arguments(microbatch_size)
        return self.accumulate.lower(*arguments).compile()

    def microbatch_size(self, config: performance.PerformanceConfig) -> int:
        """Returns the size that the config gives, or the largest that fits."""
        if config.microbatch_size != "auto":
            return int(config.microbatch_size)
        least = self.mesh.size * self.terms.least
        budget = config.budget(self.mesh.size)
        start = 1

        @functools.cache  # compiling takes seconds
        def needed(size: int) -> tuple[int, int]:
            memory: Any = self._compiled(size).memory_analysis()
            given, work = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            return given + work, given + max(work, performance.CACHE)

        if devices.platform(self.mesh) == "cpu" and not config.memory_gib:
            few = max(1, min(performance.FEW, int(self.expected_records // least)))
            of_few, in_cache = needed(few * least)
            if of_few <= budget:
                start, budget = few, min(budget, in_cache)
        return performance.largest_microbatch(
            lambda size: needed(size)[0],
            expected_batch_size=self.expected_records,
            least=least,
            budget=budget,
            start=start,
        )


def num_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the memory of one device that a compiled program takes."""
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes


def classifier(
    config: ExperimentConfig, records: Records, *, whitened: bool = True
) -> Classifier:
    """Builds the model of a config for images like these records.

    Args:
      config: of the experiment.
      records: of which nothing but public constants is taken.
      whitened: whether its embeddings are whitened if the config asks for it.

    Raises:
      UserError: for a model that does not fit the images.
    """
    return make_classifier(
        config.model.name,
        config.model.options,
        image_shape=records.image_shape,
        num_classes=records.num_classes,
        whitening=whitened and config.finetune.whitening is not None,
        dtype=config.performance.dtype,
        matmul_precision=config.performance.matmul_precision,
    )


def build(
    config: ExperimentConfig,
    model: Classifier,
    given: PyTree,
    records: Records,
    *,
    mechanism: accounting.Mechanism,
    seed: int,
    public: Records | None = None,
) -> Parts:
    """Puts the parts of a run together.

    Args:
      config: of the experiment.
      model: from `classifier`.
      given: `config.finetune.load(model.shapes)`, weights from files, and those of a
        whitening from `embeddings.whitened`.
      records: the training set.
      mechanism: says how much noise.
      seed: of the run.
      public: public images, of which a method or a pre-training may draw.
    """
    mesh = devices.make_mesh()
    platform = devices.platform(mesh)
    trained, frozen = initial_params(config.finetune, model, given, seed)

    def loss_fn(params, images, labels, *constants):
        logits = model.logits(finetune.join(params, *constants), images)
        return optax.softmax_cross_entropy(logits, labels).mean()

    encode = model.encode if finetune.is_head(trained, frozen) else None
    groups = has_groups(config)

    def gradient_by(formulation: conv.Formulation) -> Any:
        if encode:
            of_head = head_gradient(config, model, platform, formulation)
            gradient_fn = finetune.on_embeddings(of_head, encode)
        else:
            gradient_fn = _gradient(config, model, loss_fn, platform, formulation)
        return microbatch_mixup.of_groups(gradient_fn) if groups else gradient_fn

    def accumulate_by(formulation: conv.Formulation) -> Any:
        return accumulate(config, sets, gradient_by(formulation), mesh)

    terms = _terms(
        config, records, seed=seed, mechanism=mechanism, num_devices=mesh.size
    )
    sets = training.make_sets(
        _record_set(config, records),
        normalize=records.normalize,
        num_classes=records.num_classes,
    )

    gradient_fn = gradient_by(config.performance.formulation)
    sensitivity = gradient_fn.sensitivity(mechanism.neighboring_relation)
    privatize_and_step = optax.chain(
        privacy.privatizer(
            gradient_fn,
            mechanism,
            expected_batch_size=terms.expected,
            key=sampling.noise_key(seed),
        ),
        config.optimizer.build(
            noise_stddev=mechanism.noise_stddev(sensitivity) / terms.expected
        ),
    )
    arrays = (records.images, records.labels)
    drawn_from = public if config.draws_public else None
    set_bytes = sum(each.images.nbytes for each in (records, drawn_from) if each)
    on_device = config.performance.keeps_on_device(set_bytes, mesh.size)
    in_chunks = encode and model.cpu_images and platform == "cpu"
    return Parts(
        mesh=mesh,
        terms=terms,
        inputs=training.put_inputs(
            sampling.stream_key(seed, "augmentation"),
            mesh,
            records=arrays if on_device else (),
            pool=make_pool(config, drawn_from),
            constants=(frozen,) if frozen else (),
        ),
        host_records=() if on_device else arrays,
        sets=sets,
        gradient_fn=gradient_fn,
        accumulate=accumulate(config, sets, gradient_fn, mesh),
        accumulate_by=accumulate_by,
        apply_update=training.make_update(
            privatize_and_step, ema_decay=config.optimizer.ema_decay
        ),
        state=training.init_state(trained, privatize_and_step),
        frozen=frozen,
        loss_fn=loss_fn,
        # In chunks any number of images fits; one microbatch must not take hours.
        expected_records=max(1, _MOST_IMAGES // config.method.set_size)
        if in_chunks
        else config.privacy.expected_batch_size,
        clipping=config.performance.clipping_of(suits_ghost(config, model), platform),
        magnitudes=config.diagnostics.gradients,
    )


def has_groups(config: ExperimentConfig) -> bool:
    """Whether the terms of a sum are groups of records."""
    return isinstance(config.method, microbatch_mixup.MicrobatchMixupConfig)


def initial_params(
    tuning: finetune.FinetuneConfig, model: Classifier, given: PyTree, seed: int
) -> tuple[PyTree, PyTree]:
    """Returns the parameters to be trained, and those that are frozen."""

    def draw(seed: int) -> PyTree:
        return jax.tree.map(
            lambda file, drawn: (
                drawn if isinstance(file, jax.ShapeDtypeStruct) else jnp.asarray(file)
            ),
            given,
            model.init(sampling.stream_key(seed, "init")),
        )

    trained, frozen = tuning.split(draw(seed))
    if frozen:  # of a public seed: who loads the weights draws these again
        _, frozen = tuning.split(draw(0))
    return trained, frozen


def _gradient(
    config, model: Classifier, loss_fn, platform: str, formulation: conv.Formulation
) -> clipping.BoundedSensitivityCallable:
    linear_head = suits_ghost(config, model)
    name = config.performance.clipping_of(linear_head, platform)
    options: dict[str, Any] = {
        "weight": gradients.WEIGHTS[config.privacy.clipping_rule]
    }
    if config.privacy.per_layer:  # the config has seen to it that it is not ghost
        options["per_layer"] = True
    if linear_head and name == "ghost":
        options["keep"] = ghost.always
    if config.diagnostics.gradients:  # nor with these
        options["magnitudes"] = True
    clipped_gradient: Any = CLIPPED_GRADIENTS[name]
    return clipped_gradient(
        loss_fn,
        l2_clip_norm=config.privacy.l2_clip_norm,
        convolutions=formulation,
        **options,
    )


def suits_ghost(config, model: Classifier) -> bool:
    """Whether a linear head is trained, and its gradients need not be formed."""
    is_linear = finetune.is_linear_head(*config.finetune.split(model.shapes))
    formed = config.diagnostics.gradients or config.privacy.per_layer
    return is_linear and model.encode is not None and not formed


def head_gradient(
    config, model: Classifier, platform: str, formulation: conv.Formulation
) -> clipping.BoundedSensitivityCallable:
    """Returns the clipped sum of a head over embeddings."""

    def loss_fn(params, embeddings, labels, *constants):
        del constants
        logits = model.classify(params, embeddings)
        return optax.softmax_cross_entropy(logits, labels).mean()

    return _gradient(config, model, loss_fn, platform, formulation)


def accumulate(config, sets: training.MakeSets, gradient_fn, mesh) -> Any:
    """Returns what adds the clipped sum of a microbatch to the sums of its batch."""
    return training.make_accumulate(
        training.make_clipped_sum(
            sets, gradient_fn, l2_clip_norm=config.privacy.l2_clip_norm
        ),
        mesh,
    )


def _terms(config, records: Records, *, seed, mechanism, num_devices) -> Terms:
    method, size = config.method, config.privacy.expected_batch_size
    drawn = {"num_records": len(records), "sampling_prob": mechanism.sampling_prob}
    if not has_groups(config):
        bands = {"bands": mechanism.bands, "allocated": mechanism.allocated}
        return Terms(
            expected=size,
            indices=lambda m: sampling.batches(
                seed, microbatch_size=m, **drawn, **bands
            ),
            padding=lambda m: np.full(m, -1),
            least=1,
        )
    groups = {"num_groups": method.num_groups(size), "num_devices": num_devices}
    blank = microbatch_mixup.blank_microbatch
    return Terms(
        expected=groups["num_groups"],
        indices=lambda m: microbatch_mixup.batches(
            seed, microbatch_size=m, **drawn, **groups
        ),
        padding=lambda m: blank(method, m, num_devices),
        least=blank(method, 1, num_devices).size // num_devices,
    )


def _record_set(config, records: Records) -> mixup.RecordSet:
    """Returns what makes the set of a record, or of a group of them."""
    if has_groups(config):
        return microbatch_mixup.group_set(config.method, config.augmentation)
    return mixup.augmentation_set(
        config.method, config.augmentation, normalize=records.normalize
    )


def make_pool(config, public: Records | None) -> pool.Pool | None:
    """Returns the public images that sets draw of, or None if there are none."""
    if public is None:
        return None
    return pool.make_pool(
        public.images,
        public.labels,
        public.class_names,
        draw=config.method.draw if config.method.num_public else "uniform",
    )


def example_set(
    config: ExperimentConfig, test: Records, public_pool: pool.Pool | None
) -> np.ndarray:
    """Makes the set of the first test image, or group, with pixels in [0, 1].

    Args:
      config: of the experiment.
      test: records, of which the first are taken.
      public_pool: from `make_pool`.

    Returns:
      [K, H, W, C].
    """
    method = config.method
    shape: tuple[int, ...] = (1,)
    if isinstance(method, microbatch_mixup.MicrobatchMixupConfig):
        shape = (1, method.group_size)
    indices = np.arange(math.prod(shape)).reshape(shape) % len(test)
    key = sampling.stream_key(0, "augmentation")  # public: nothing private here
    make = jax.jit(jax.vmap(_record_set(config, test), (0, 0, 0, None)))
    images, _ = make(
        sampling.record_keys(key, jnp.int32(0), jnp.asarray(indices)),
        test.normalize(jnp.asarray(test.images[indices])),
        jax.nn.one_hot(test.labels[indices], test.num_classes),
        public_pool,
    )
    return np.asarray(images[0]) * np.array(test.stddev) + np.array(test.mean)
