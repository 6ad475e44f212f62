"""All randomness of a run: named streams of one seed, and the Poisson batch of a step.

Batches and augmentation keys are pure functions of (seed, step, record). Nothing of
them is carried from one update to the next, so a run that resumes, or that uses another
microbatch size or another number of devices, draws the same batches and the same views.
(The key of the noise is carried along, in the state of `privacy.privatizer`.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy import batch_selection

from dpmix_jax.errors import UserError

STREAMS = ("init", "sampling", "augmentation", "noise", "groups", "pretraining")


def _sequence(seed: int, stream: str, *path: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(STREAMS.index(stream), *path))


def stream_key(seed: int, stream: str) -> jax.Array:
    """Returns the JAX key of a named stream.

    Args:
      seed: a non-negative integer of any size. Secret, if the guarantee is to hold:
        whoever knows it can draw the noise again and subtract it.
      stream: one of `STREAMS`.

    Returns:
      A scalar typed threefry key. Streams of one seed are independent.
    """
    words = _sequence(seed, stream).generate_state(2, np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def record_keys(key: jax.Array, step: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns one augmentation key for each record of a microbatch of update `step`.

    Formal guarantees:
      - The key of a record depends on (key, step, its index) alone, not on its place
        in the batch or on the other records.

    Args:
      key: the scalar key of the augmentation stream.
      step: scalar integer, the update.
      indices: integer indices of records, of any shape; padding (-1) gets a key of its
        own.

    Returns:
      Typed keys of that shape.
    """
    step_key = jax.random.fold_in(key, step)
    keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(indices.reshape(-1))
    return keys.reshape(indices.shape)


def poisson_batch(
    seed: int, step: int, *, num_records: int, sampling_prob: float
) -> np.ndarray:
    """Draws the records of update `step`: each one independently, with one probability.

    Formal guarantees:
      - Every record is in the batch with probability `sampling_prob`, independently of
        the other records and of the other steps (Poisson sampling, as the accountant
        assumes). Nothing is truncated.
      - The batch is a pure function of the arguments.

    Args:
      seed: the seed of the run (see `stream_key`).
      step: the update, from 0.
      num_records: N, size of the training set.
      sampling_prob: q in [0, 1], the expected batch size over N.

    Returns:
      Integer indices in [0, N), without repeats, of random length (0 is possible).

    Raises:
      UserError: if `sampling_prob` is outside [0, 1] or `num_records` below 1.
    """
    if num_records < 1:
        raise UserError(f"num_records is {num_records}: it must be at least 1")
    if not 0.0 <= sampling_prob <= 1.0:
        raise UserError(f"sampling_prob is {sampling_prob}: it must be in [0, 1]")
    # One iteration of jax_privacy's sampler from a generator of this step alone makes
    # the batch of step t available without drawing the t before it.
    generator = np.random.Generator(np.random.Philox(_sequence(seed, "sampling", step)))
    strategy = batch_selection.CyclicPoissonSampling(
        sampling_prob=sampling_prob, iterations=1
    )
    batch = next(iter(strategy.batch_iterator(num_records, rng=generator)))
    return batch.astype(np.int32)


def microbatches(indices: np.ndarray, microbatch_size: int) -> list[np.ndarray]:
    """Splits a batch into microbatches of one fixed shape, so that nothing recompiles.

    Args:
      indices: [n] integer indices of records, or [n, c] of groups; n may be 0.
      microbatch_size: m, the records or groups of a microbatch.

    Returns:
      ceil(n / m) arrays of shape [m] or [m, c], the last one padded with -1; none for
      n = 0.
    """
    if indices.size == 0:
        return []
    return batch_selection.split_and_pad_global_batch(indices, microbatch_size)


def random_groups(
    seed: int, step: int, indices: np.ndarray, *, num_records: int, num_groups: int
) -> list[np.ndarray]:
    """Puts each record of a batch into a group, whoever else was drawn.

    Were groups filled one after the other, a record that joins would shift all after
    it, and every later group would change. Here it changes its own group only; the
    price is that groups differ in size, and that some have a single record.

    Formal guarantees:
      - The group of a record is uniform, independent of the batch and of the groups of
        the others, and a pure function of (seed, step, its index).

    Args:
      seed: the seed of the run (see `stream_key`).
      step: the update, from 0.
      indices: [n] records of its batch, as from `poisson_batch`.
      num_records: N.
      num_groups: G, a constant: n must not matter.

    Returns:
      int32 arrays [g, c], a row for each group that is not empty: its records, then -1.
      Groups of one array have the same c, the least power of two that holds them: so
      few shapes are compiled, and no group's depends on another group.
    """
    generator = np.random.Generator(np.random.Philox(_sequence(seed, "groups", step)))
    group_of = generator.integers(0, num_groups, num_records)[indices]
    by_capacity: dict[int, list[np.ndarray]] = {}
    for group in np.unique(group_of):
        members = indices[group_of == group]
        capacity = group_capacity(len(members))
        row = np.full(capacity, -1, np.int32)
        row[: len(members)] = members
        by_capacity.setdefault(capacity, []).append(row)
    return [np.stack(by_capacity[capacity]) for capacity in sorted(by_capacity)]


def group_capacity(size: int) -> int:
    """Returns the least power of two that is no less."""
    return 1 << (size - 1).bit_length()


def batches(
    seed: int,
    *,
    num_records: int,
    sampling_prob: float,
    microbatch_size: int,
    num_groups: int | None = None,
    num_devices: int = 1,
) -> Callable[[int], list[np.ndarray]]:
    """Returns the function from an update to the microbatches of its Poisson batch.

    Args:
      seed: of the run.
      num_records: N.
      sampling_prob: q.
      microbatch_size: m records, a multiple of `num_devices`.
      num_groups: G, to put the records into `random_groups`, or None.
      num_devices: over which groups are to divide.
    """

    def draw(step: int) -> list[np.ndarray]:
        batch = poisson_batch(
            seed, step, num_records=num_records, sampling_prob=sampling_prob
        )
        if num_groups is None:
            return microbatches(batch, microbatch_size)
        return [
            part
            for groups in random_groups(
                seed, step, batch, num_records=num_records, num_groups=num_groups
            )
            for part in microbatches(
                groups, groups_at_once(microbatch_size, groups.shape[1], num_devices)
            )
        ]

    return draw


def groups_at_once(microbatch_size: int, capacity: int, num_devices: int = 1) -> int:
    """Returns how many groups have about as many places as a microbatch has records."""
    return max(1, microbatch_size // (capacity * num_devices)) * num_devices
