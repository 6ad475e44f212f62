"""The training loop: the only place where the parts of the package meet.

One update, in the order in which data flow: `sampling` draws the records, `mixup` makes
each one's augmentation set, `gradients` clips and sums, `privacy` adds noise, optax
moves the parameters, and an exponential moving average follows them.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax_privacy import clipping

from dpmix_jax import sampling
from dpmix_jax.bank import Bank
from dpmix_jax.data import Records
from dpmix_jax.errors import UserError
from dpmix_jax.mixup import RecordSet

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD at a constant rate, and the average of its iterates.

    Attributes:
      learning_rate: positive.
      momentum: in [0, 1).
      weight_decay: at least 0; this share of the weights is added to the private
        gradient.
      ema_decay: in [0, 1), the decay of the averaged weights.
    """

    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    ema_decay: float = 0.9999

    def __post_init__(self):
        if not 0 < self.learning_rate < math.inf:
            raise UserError(
                f"optimizer.learning_rate is {self.learning_rate}: it must be positive"
                " and finite"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(
                f"optimizer.weight_decay is {self.weight_decay}: it must be at least 0"
                " and finite"
            )
        for name in ("momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"optimizer.{name} is {getattr(self, name)}: it must be in [0, 1)"
                )

    def build(self) -> optax.GradientTransformation:
        sgd = optax.sgd(self.learning_rate, self.momentum or None)
        if not self.weight_decay:
            return sgd
        return optax.chain(optax.add_decayed_weights(self.weight_decay), sgd)


class TrainState(NamedTuple):
    """Everything that one update hands to the next.

    Attributes:
      step: scalar int32, updates done.
      params: float32 pytree.
      ema_params: average of `params` over the updates.
      opt_state: of the chained privatizer and optimizer. It holds the key of the next
        noise, hence is secret.
    """

    step: jax.Array
    params: PyTree
    ema_params: PyTree
    opt_state: PyTree


class Totals(NamedTuple):
    """Sums over the records of one batch, as microbatches come in.

    Attributes:
      gradients: clipped sum, float32 pytree like the parameters.
      nonprivate: `loss`, `clipped` and `records`, sums over the drawn records.
    """

    gradients: PyTree
    nonprivate: dict[str, jax.Array]


def make_mesh(devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Returns a one-axis mesh over which the records of a microbatch are spread."""
    return jax.make_mesh(
        (len(devices or jax.devices()),),
        ("records",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=devices,
    )


def sum_over_devices(
    function: Callable[[PyTree, PyTree], PyTree], mesh: jax.sharding.Mesh
) -> Callable[[PyTree, PyTree], PyTree]:
    """Runs `function(shared, records) -> sums` on every device's part of the records.

    Neither alternative is right. `jax.shard_map` with its default `check_vma` sums the
    gradients over devices before the clip: with C = 1 on four devices, removing one
    record moves the sum by 3.7. Under plain `jit`, XLA's partitioner either computes
    every record's convolution gradients on every device, or (one image a record, a few
    records a device; seen in jax 0.10.2) gets them wrong without a word.

    Formal guarantees:
      - Each device runs `function` as it would alone; only its outputs are summed.

    Args:
      function: its outputs must be sums over records.
      mesh: from `make_mesh`.

    Returns:
      A function of the same signature, to be called under `jit`: `shared` is whole on
      every device, the leading axis of each leaf of `records` is split over them.
    """
    everywhere, spread = PartitionSpec(), PartitionSpec("records")
    return jax.shard_map(
        lambda shared, records: jax.lax.psum(function(shared, records), "records"),
        mesh=mesh,
        in_specs=(everywhere, spread),
        out_specs=everywhere,
        check_vma=False,
    )


class Accumulate:
    """One microbatch, compiled: records, their sets, clipped gradients, running sums.

    `f(params, step, batch, totals) -> totals` adds the records of a microbatch from
    `place` to `totals`, which it donates. The dataset lives on every device as uint8
    and only indices travel, or else on the host and the records of a microbatch do. The
    public bank always lives on every device.

    Formal guarantees:
      - Adds to `totals.gradients` at most `gradient_fn.sensitivity(relation)` more or
        less for neighbouring batches, on any number of devices and processes.
      - The sum over a batch depends on microbatch size, devices and where the dataset
        lives in float rounding only.
      - Compiles once, whatever batch sizes are drawn (of groups, once for each c).
      - With `encode`, record i's term depends on the embeddings of its own images
        alone, and each of them on its image and `frozen` alone.

    Args:
      gradient_fn: from `clipped_gradient`, of a loss over (images, labels) of one set.
      record_set: from `augmentation_set`, or `group_set` for groups of records.
      records: the training set.
      mesh: from `make_mesh`.
      key: scalar key of the augmentation stream.
      l2_clip_norm: C, to count clipped records (not private).
      bank: the public images that `record_set` draws from, if it does.
      frozen: what the loss needs besides parameters, see `clipped_gradient`, or None.
      encode: `f(frozen, images [N, H, W, C]) -> [N, E]`, each from its image alone. The
        loss then takes embeddings in place of images, and nothing frozen: forward
        passes are made for all sets at once, before any gradient.
      on_device: whether the dataset lives on the devices, or on the host.
    """

    def __init__(
        self,
        gradient_fn: clipping.BoundedSensitivityCallable,
        record_set: RecordSet,
        records: Records,
        mesh: jax.sharding.Mesh,
        *,
        key: jax.Array,
        l2_clip_norm: float,
        bank: Bank | None = None,
        frozen: PyTree | None = None,
        encode: Callable[[PyTree, jax.Array], jax.Array] | None = None,
        on_device: bool = True,
    ):
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._mesh = mesh
        self._arrays = (records.images, records.labels)
        self.on_device = on_device
        table = self._arrays if on_device else ()
        # The key is an argument, not a constant: compiled code is cached on disk. So is
        # the bank, which would be copied into that code.
        words = np.asarray(jax.random.key_data(key))
        self._fixed = jax.tree.map(
            lambda array: put(np.asarray(array), everywhere),
            (table, words, bank, frozen),
        )

        def batch_sums(shared, batch) -> Totals:
            params, step, (table, words, bank, frozen) = shared
            indices, *drawn = batch
            images, labels = drawn or (
                jnp.take(array, indices, axis=0, mode="clip") for array in table
            )
            # One for a record; [m, c] for groups, whose absent members have no label.
            present = (indices >= 0).astype(jnp.float32)
            targets = jax.nn.one_hot(labels, records.num_classes) * present[..., None]
            members = present.reshape(present.shape[0], -1).sum(axis=1)
            key = jax.random.wrap_key_data(words)
            keys = sampling.record_keys(key, step, indices)
            images, targets = jax.vmap(record_set, in_axes=(0, 0, 0, None))(
                keys, records.normalize(images), targets, bank
            )
            if encode is not None:
                *sets, height, width, channels = images.shape
                flat = images.reshape(-1, height, width, channels)
                images = encode(frozen, flat).reshape(*sets, -1)
                frozen = None
            gradients, aux = gradient_fn(
                params,
                images,
                targets,
                is_padding_example=members == 0,
                frozen=frozen,
            )
            clipped = aux.grad_norms > l2_clip_norm
            nonprivate = {
                "loss": jnp.sum(members * aux.values, where=members > 0),
                "clipped": jnp.sum(members, where=clipped),
                "records": jnp.sum(members),
            }
            return Totals(gradients, nonprivate)

        @jax.jit(donate_argnums=2)
        def accumulate(shared, batch, totals):
            part = sum_over_devices(batch_sums, mesh)(shared, batch)
            return jax.tree.map(lambda t, p: t + p.astype(t.dtype), totals, part)

        self._accumulate = accumulate

    @property
    def bank(self) -> Bank | None:
        """The public images, on the devices."""
        return self._fixed[2]

    @property
    def frozen(self) -> PyTree | None:
        """What is not trained, on the devices."""
        return self._fixed[3]

    def place(self, indices: np.ndarray) -> list[jax.Array]:
        """Puts a microbatch on the devices: [m] or [m, c] indices, -1 for padding."""
        spread = NamedSharding(self._mesh, PartitionSpec("records"))
        batch = [put(np.asarray(indices, np.int32), spread)]
        rows = np.maximum(indices, 0)
        for array in () if self.on_device else self._arrays:
            shape = (*rows.shape, *array.shape[1:])
            # Every process reads the records of its own devices only.
            read = lambda part, array=array: array[rows[part[0]]]  # noqa: E731
            batch.append(jax.make_array_from_callback(shape, spread, read))
        return batch

    def __call__(
        self,
        params: PyTree,
        step: jax.Array,
        batch: Sequence[jax.Array],
        totals: Totals,
    ) -> Totals:
        return self._accumulate((params, step, self._fixed), batch, totals)

    def bytes_needed(self, params: PyTree, indices: np.ndarray) -> int:
        """Returns the memory of one device that a microbatch takes, by compiling it."""
        batch = self.place(indices)
        totals = init_totals(params, self._mesh)
        shared = (params, jnp.int32(0), self._fixed)
        used = self._accumulate.lower(shared, batch, totals).compile()
        analysis: Any = used.memory_analysis()
        return analysis.temp_size_in_bytes + analysis.argument_size_in_bytes


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Places an array that every process holds whole."""
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def init_totals(params: PyTree, mesh: jax.sharding.Mesh) -> Totals:
    """Returns float32 zeros to accumulate into."""
    nothing = {name: jnp.float32(0) for name in ("loss", "clipped", "records")}
    zeros = Totals(
        jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params), nothing
    )
    return jax.device_put(zeros, NamedSharding(mesh, PartitionSpec()))


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


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


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
    def update(state: TrainState, gradients: PyTree) -> TrainState:
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(
            step=state.step + 1,
            params=params,
            ema_params=ema_update(state.ema_params, params, ema_decay, state.step),
            opt_state=opt_state,
        )

    return update


def train(
    state: TrainState,
    accumulate: Accumulate,
    update: Callable[[TrainState, PyTree], TrainState],
    *,
    mesh: jax.sharding.Mesh,
    draw: Callable[[int], Iterable[np.ndarray]],
    num_updates: int,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[TrainState, dict[str, jax.Array]]]:
    """Yields (state, nonprivate sums of its batch) after each update still to be done.

    Microbatches accumulate from Python: convolutions inside `lax.scan` are many times
    slower on CPU, and on an accelerator calls are queued ahead all the same.

    Args:
      state: from `init_state` or a checkpoint; `state.step` updates are done.
      accumulate: an `Accumulate`.
      update: from `make_update`.
      mesh: from `make_mesh`.
      draw: returns the microbatches of an update, none for an empty batch.
      num_updates: T.
      stop: asked before each microbatch; once true, the update under way is dropped
        and the iterator ends.
    """
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))

    def parts() -> Iterator[np.ndarray | None]:
        for step in range(int(state.step), num_updates):
            yield from draw(step)
            yield None  # the end of a batch, also of an empty one

    totals = init_totals(state.params, mesh)
    for part in _ahead(parts(), lambda p: None if p is None else accumulate.place(p)):
        if part is None:
            state = update(state, totals.gradients)
            yield state, totals.nonprivate
            totals = init_totals(state.params, mesh)
        elif stop():
            return
        else:
            if not accumulate.on_device:  # no more records there than memory allows
                jax.block_until_ready(totals)
            totals = accumulate(state.params, state.step, part, totals)


def _ahead(
    items: Iterable[Any], function: Callable[[Any], Any], depth: int = 2
) -> Iterator[Any]:
    """Maps in order, a few items ahead in another thread, so that devices need not wait
    for records to be read.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        pending: collections.deque[Future] = collections.deque()
        try:
            for item in items:
                pending.append(thread.submit(function, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
