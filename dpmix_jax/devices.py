"""Devices of one or more processes: where arrays lie, and the sum over all of them."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any
Item = TypeVar("Item")
Result = TypeVar("Result")

EVERYWHERE, SPREAD = PartitionSpec(), PartitionSpec("records")


def make_mesh(devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Returns a one-axis mesh over which the records of a microbatch are spread."""
    return jax.make_mesh(
        (len(devices or jax.devices()),),
        ("records",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=devices,
    )


def platform(mesh: jax.sharding.Mesh) -> str:
    """Returns what kind the devices of a mesh are: `cpu`, `gpu` or `tpu`."""
    return mesh.devices.flat[0].platform


def sum_over_devices(
    function: Callable[[PyTree, jax.Array, PyTree, PyTree], PyTree],
    mesh: jax.sharding.Mesh,
) -> Callable[[PyTree, jax.Array, PyTree, PyTree], PyTree]:
    """Runs `function(params, step, batch, inputs)` on every device's part of a batch.

    The alternatives give wrong sums. `jax.shard_map` with its default `check_vma` sums
    the gradients over devices before the clip: with C = 1 on four devices, removing one
    record moves the sum by 3.7. Under plain `jit`, XLA's partitioner either computes
    every record's convolution gradients on every device, or (one image a record, a few
    records a device; seen in jax 0.10.2) gets them wrong without a word.

    Formal guarantees:
      - Each device runs `function` as it would alone; only its outputs are summed.

    Args:
      function: such as a clipped sum; its outputs must be sums over terms.
      mesh: from `make_mesh`.

    Returns:
      A function of the same signature, to be called under `jit`. The leading axis of
      each leaf of `batch` is split over the devices, all else is whole on each.
    """
    return jax.shard_map(
        lambda *arguments: jax.lax.psum(function(*arguments), "records"),
        mesh=mesh,
        in_specs=(EVERYWHERE, EVERYWHERE, SPREAD, EVERYWHERE),
        out_specs=EVERYWHERE,
        check_vma=False,
    )


def everywhere(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are whole on every device."""
    return NamedSharding(mesh, EVERYWHERE)


def put_everywhere(tree: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Puts arrays, which every process holds whole, on every device."""

    def put(leaf):
        array = np.asarray(leaf)
        return jax.make_array_from_callback(
            array.shape, everywhere(mesh), lambda part: array[part]
        )

    return jax.tree.map(put, tree)


def put_spread(
    shape: tuple[int, ...], mesh: jax.sharding.Mesh, read: Callable[[slice], np.ndarray]
) -> jax.Array:
    """Spreads an array over the devices along its first axis.

    Args:
      shape: of the whole; the first size is a multiple of the number of devices.
      mesh: from `make_mesh`.
      read: returns a slice of the first axis. A process reads for its own devices only.
    """
    spread = NamedSharding(mesh, SPREAD)
    return jax.make_array_from_callback(
        shape,
        spread,
        lambda part: read(part[0]),  # type: ignore[index]
    )


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], depth: int = 2
) -> Iterator[Result]:
    """Maps in order, a few items ahead in another thread.

    So devices need not wait for records to be read.
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
