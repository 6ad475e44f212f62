"""One private update as pure functions, and the loop over it.

Read from top to bottom, in the order in which data flow: the records of a microbatch
become augmentation sets (`make_sets`), whose gradients are clipped and summed
(`make_clipped_sum`), over devices and microbatches (`make_accumulate`); noise is added
to the whole sum once, and the parameters move (`make_update`); `train` repeats that.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_privacy import clipping

from dpmix_jax import devices, sampling
from dpmix_jax.mixup import RecordSet
from dpmix_jax.pool import Pool

PyTree = Any
Arrays = tuple[Any, ...]


class TrainState(NamedTuple):
    """Everything that one update hands to the next.

    Attributes:
      step: scalar int32, updates done.
      params: float32 pytree.
      ema_params: average of `params` over the updates.
      opt_state: of the chained privatizer and optimizer. It is secret, see
        `privacy.NoiseState`.
    """

    step: jax.Array
    params: PyTree
    ema_params: PyTree
    opt_state: PyTree


class Inputs(NamedTuple):
    """What stays on every device for a whole run.

    Compiled functions take `Inputs` as an argument, because records are private: JAX's
    compilation cache on disk may hold the arrays that a function closes over.

    Attributes:
      key_words: uint32 [2], the key of the augmentation stream.
      records: images [N, H, W, C] and labels [N] of the training set, or () for a
        training set on the host.
      pool: the public images that sets draw from, or None.
      constants: what the loss takes after the labels, the same for every record.
    """

    key_words: jax.Array
    records: Arrays = ()
    pool: Pool | None = None
    constants: Arrays = ()


class Batch(NamedTuple):
    """A microbatch, its first axis spread over the devices.

    Attributes:
      indices: int32 [m] of records, -1 for padding; [m, c] for terms of c records.
      records: images and labels at these indices, or () to look them up in `Inputs`.
    """

    indices: jax.Array
    records: Arrays = ()


class Sums(NamedTuple):
    """Sums over a batch; a term is that of one record, or of one group of records.

    Attributes:
      gradients: the clipped sum, float32 pytree like the parameters.
      nonprivate: float32 sums over the drawn records: `loss`, `clipped` (how many have
        a norm above C), `records` (how many there are) and, if asked for, `magnitudes`
        (see `gradients.clipped_gradient`), like the parameters.
    """

    gradients: PyTree
    nonprivate: dict[str, Any]


class Sets(NamedTuple):
    """The augmentation sets of the terms of a microbatch.

    Attributes:
      images: [m, K, H, W, C], or what the loss takes in the place of images.
      labels: soft labels [m, K, O].
      records: float32 [m], how many records each term stands for: 1, or 0 for padding,
        or the members of a group.
    """

    images: jax.Array
    labels: jax.Array
    records: jax.Array


MakeSets = Callable[[jax.Array, Batch, Inputs], Sets]


def make_sets(
    record_set: RecordSet,
    *,
    normalize: Callable[[jax.Array], jax.Array],
    num_classes: int,
) -> MakeSets:
    """Returns what turns the records of a microbatch into their augmentation sets.

    Formal guarantees:
      - Record i's set depends on record i, its index, the step, the key and the public
        pool alone, on no other record.

    Args:
      record_set: from `mixup.augmentation_set`. With that of a group of records, from
        `microbatch_mixup.group_set`, the guarantee is one for groups.
      normalize: uint8 images [..., H, W, C] to the floats that sets are made of.
      num_classes: O.

    Returns:
      `f(step, batch, inputs) -> Sets`.
    """

    def sets(step: jax.Array, batch: Batch, inputs: Inputs) -> Sets:
        indices = batch.indices
        present = (indices >= 0).astype(jnp.float32)
        images, labels = look_up(batch, inputs)
        labels = jax.nn.one_hot(labels, num_classes) * present[..., None]
        key = sampling.threefry_key(inputs.key_words)
        keys = sampling.record_keys(key, step, indices)
        images, labels = jax.vmap(record_set, (0, 0, 0, None))(
            keys, normalize(images), labels, inputs.pool
        )
        return Sets(images, labels, present.reshape(len(indices), -1).sum(axis=1))

    return sets


def look_up(batch: Batch, inputs: Inputs) -> Arrays:
    """Returns the rows of a microbatch, from the host or from the device."""
    return batch.records or tuple(
        jnp.take(array, batch.indices, axis=0, mode="clip") for array in inputs.records
    )


def make_clipped_sum(
    sets: MakeSets,
    gradient_fn: clipping.BoundedSensitivityCallable,
    *,
    l2_clip_norm: float,
) -> Callable[[PyTree, jax.Array, Batch, Inputs], Sums]:
    """Returns what a device computes of its part of a microbatch.

    Formal guarantees:
      - Record i's term depends on record i, its index, the parameters, the step, the
        key and public inputs alone, on no other record.
      - For neighbouring batches `gradients` differ by at most
        `gradient_fn.sensitivity(relation)`.

    Args:
      sets: from `make_sets`.
      gradient_fn: from `gradients.clipped_gradient`, of a loss over one set.
      l2_clip_norm: C, to count clipped terms (not private).

    Returns:
      `f(params, step, batch, inputs) -> Sums`.
    """

    def clipped_sum(
        params: PyTree, step: jax.Array, batch: Batch, inputs: Inputs
    ) -> Sums:
        images, labels, records = sets(step, batch, inputs)
        gradients, aux = gradient_fn(
            params,
            images,
            labels,
            constants=inputs.constants,
            is_padding_example=records == 0,
        )
        nonprivate = {
            "loss": jnp.sum(records * aux.values, where=records > 0),
            "clipped": jnp.sum(records, where=aux.grad_norms > l2_clip_norm),
            "records": jnp.sum(records),
        }
        if aux.aux is not None:
            nonprivate["magnitudes"] = aux.aux
        return Sums(gradients, nonprivate)

    return clipped_sum


def make_accumulate(
    clipped_sum: Callable[[PyTree, jax.Array, Batch, Inputs], Sums],
    mesh: jax.sharding.Mesh,
) -> Any:
    """Compiles the addition of a microbatch to the sums of its batch.

    Formal guarantees:
      - For neighbouring batches, what is added to `sums.gradients` differs by at most
        the sensitivity of `gradient_fn`, on any number of devices and processes.
      - Another microbatch size, other devices or a dataset on the host change the sum
        over a batch by float rounding only.
      - Compiles once, whatever batch sizes are drawn (for terms of c records, once for
        each c).

    Args:
      clipped_sum: from `make_clipped_sum`.
      mesh: from `devices.make_mesh`.

    Returns:
      A compiled `f(sums, params, step, batch, inputs) -> sums`, which donates `sums`.
    """
    of_all_devices = devices.sum_over_devices(clipped_sum, mesh)

    @jax.jit(donate_argnums=0)
    def accumulate(
        sums: Sums, params: PyTree, step: jax.Array, batch: Batch, inputs: Inputs
    ) -> Sums:
        part = of_all_devices(params, step, batch, inputs)
        return jax.tree.map(lambda s, p: s + p.astype(s.dtype), sums, part)

    return accumulate


def make_update(
    optimizer: optax.GradientTransformation, *, ema_decay: float
) -> Callable[[TrainState, PyTree], TrainState]:
    """Compiles what follows the sum: noise and division, optimizer, average.

    Args:
      optimizer: chain of a `privacy.privatizer` and any optax optimizer.
      ema_decay: see `ema_update`.

    Returns:
      `f(state, clipped sum) -> state`. It is to be called once per update, also for an
      empty batch, whose sum is zero.
    """

    @jax.jit
    def apply_update(state: TrainState, gradients: PyTree) -> TrainState:
        # The first of the chain adds the noise and divides, then the parameters move.
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(
            step=state.step + 1,
            params=params,
            ema_params=ema_update(state.ema_params, params, ema_decay, state.step),
            opt_state=opt_state,
        )

    return apply_update


def ema_update(ema: PyTree, new: PyTree, decay: float, step: jax.Array) -> PyTree:
    """Moves an average of the weights, faster in the first steps (De et al., 2022).

    The decay in effect is min(decay, (1 + step) / (10 + step)), so that the random
    initial weights are soon forgotten.

    Args:
      ema: average after `step` updates.
      new: weights after update `step` (from 0).
      decay: in [0, 1).
      step: scalar integer.
    """
    count = step.astype(jnp.float32)
    in_effect = jnp.minimum(jnp.float32(decay), (1.0 + count) / (10.0 + count))
    return optax.incremental_update(new, ema, 1.0 - in_effect)


def train(
    state: TrainState,
    accumulate: Callable[..., Sums],
    apply_update: Callable[[TrainState, PyTree], TrainState],
    inputs: Inputs,
    *,
    mesh: jax.sharding.Mesh,
    batches: Callable[[int], Iterable[Batch]],
    num_updates: int,
    magnitudes: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[TrainState, dict[str, Any]]]:
    """Yields (state, nonprivate sums of its batch) after each update still to be done.

    Microbatches accumulate from Python: convolutions inside `lax.scan` are many times
    slower on CPU, and on an accelerator calls are queued ahead all the same.

    Args:
      state: from `init_state` or a checkpoint; `state.step` updates are done.
      accumulate: from `make_accumulate`.
      apply_update: from `make_update`.
      inputs: from `put_inputs`.
      mesh: from `devices.make_mesh`.
      batches: returns the microbatches of an update, none for an empty batch.
      num_updates: T.
      magnitudes: whether `accumulate` adds them up too.
      stop: asked before each microbatch; once true, the update under way is dropped
        and the iterator ends.
    """
    state = jax.device_put(state, devices.everywhere(mesh))
    for step in range(int(state.step), num_updates):
        sums = init_sums(state.params, mesh, magnitudes=magnitudes)
        for batch in batches(step):
            if stop():
                return
            if batch.records:  # wait, lest copies in a queue fill the devices' memory
                jax.block_until_ready(sums)
            sums = accumulate(sums, state.params, state.step, batch, inputs)
        state = apply_update(state, sums.gradients)
        yield state, sums.nonprivate


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


@functools.partial(jax.jit, static_argnames=("mesh", "magnitudes"))
def init_sums(
    params: PyTree, mesh: jax.sharding.Mesh, *, magnitudes: bool = False
) -> Sums:
    """Returns float32 zeros to accumulate into, of one call for all leaves."""
    names = ("loss", "clipped", "records")
    nonprivate: dict[str, Any] = dict.fromkeys(names, jnp.zeros(()))
    if magnitudes:
        nonprivate["magnitudes"] = params
    zeros = jax.tree.map(
        lambda p: jnp.zeros(p.shape, jnp.float32), Sums(params, nonprivate)
    )
    return jax.lax.with_sharding_constraint(zeros, devices.everywhere(mesh))


def put_inputs(
    key: jax.Array,
    mesh: jax.sharding.Mesh,
    *,
    records: Arrays = (),
    pool: Pool | None = None,
    constants: Arrays = (),
) -> Inputs:
    """Puts what a run needs on every device; see `Inputs`."""
    inputs = Inputs(jax.random.key_data(key), records, pool, constants)
    return devices.put_everywhere(inputs, mesh)


def put_batch(
    indices: np.ndarray, mesh: jax.sharding.Mesh, host_records: Arrays = ()
) -> Batch:
    """Spreads a microbatch over the devices.

    Args:
      indices: integer [m] or [m, c], -1 for padding; m is a multiple of the devices.
      mesh: from `devices.make_mesh`.
      host_records: images and labels of a training set that lives on the host.
    """
    indices = np.asarray(indices, np.int32)
    rows = np.maximum(indices, 0)

    def read(array: np.ndarray) -> jax.Array:
        shape = (*rows.shape, *array.shape[1:])
        return devices.put_spread(shape, mesh, lambda part: array[rows[part]])

    spread = devices.put_spread(indices.shape, mesh, lambda part: indices[part])
    return Batch(spread, tuple(map(read, host_records)))
