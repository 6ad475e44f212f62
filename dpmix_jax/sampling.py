"""The randomness of training: named streams of one seed, and the batch of a step.

Batches and augmentation keys are pure functions of (seed, step, record). Nothing of
them is carried from one update to the next, so a run that resumes, or that uses another
microbatch size or another number of devices, draws the same batches and the same views.
(The key of the noise is carried along, in the state of `privacy.privatizer`.)

Two things must be secret for the guarantee to hold: which records are in a batch, drawn
from 128-bit keys, and the noise, from one of 256 bits. Whatever the other streams
draw, a record's term is clipped all the same.
"""

import hashlib
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy import batch_selection

from dpmix_jax import allocation
from dpmix_jax.errors import require, require_one_of

STREAMS = (
    *("init", "sampling", "turns", "allocation", "groups"),
    *("augmentation", "sets", "pretraining"),
)


def generator(seed: int, stream: str, *path: int) -> np.random.Generator:
    """Returns the NumPy generator of a stream, or of a part of it such as a step."""
    return np.random.Generator(np.random.Philox(_sequence(seed, stream, *path)))


def _sequence(seed: int, stream: str, *path: int) -> np.random.SeedSequence:
    require_one_of("the stream", stream, STREAMS)
    entropy = int.from_bytes(_digest(seed, stream), "little")
    return np.random.SeedSequence(entropy, spawn_key=path)


def _digest(seed: int, stream: str) -> bytes:
    """Returns the 256 bits of a stream; they tell nothing of those of another."""
    require(operator.index(seed) >= 0, "seed", seed, "at least 0")
    return hashlib.sha256(
        f"dpmix_jax {stream} {operator.index(seed)}".encode()
    ).digest()


def stream_key(seed: int, stream: str) -> jax.Array:
    """Returns the JAX key of a named stream.

    Args:
      seed: a non-negative integer of any size. Secret, if the guarantee is to hold:
        whoever knows it can draw the noise again and subtract it.
      stream: one of `STREAMS`.

    Returns:
      A scalar typed threefry key. Streams of one seed are independent.
    """
    return threefry_key(_sequence(seed, stream).generate_state(2, np.uint32))


def threefry_key(words: jax.typing.ArrayLike) -> jax.Array:
    """Returns the scalar key of these words, uint32 [2], whatever JAX's default is."""
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def noise_key(seed: int) -> jax.Array:
    """Returns the key of the noise of the first update, for `privacy.privatizer`.

    Args:
      seed: a non-negative integer of any size; of 256 secret bits for a release.

    Returns:
      uint32 [8].
    """
    words = np.frombuffer(_digest(seed, "noise"), "<u4")
    return jnp.asarray(words.astype(np.uint32))


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
    seed: int, step: int, *, num_records: int, sampling_prob: float, bands: int = 1
) -> np.ndarray:
    """Draws the records of update `step`: each one independently, with one probability.

    Formal guarantees:
      - With one band every record is in the batch with probability `sampling_prob`,
        independently of the other records and of the other steps (Poisson sampling, as
        the accountant assumes). Nothing is truncated.
      - The batch is a pure function of the arguments.
      - With b bands every record has its turn in one step of every b, drawn for it
        alone. In its turn it is in the batch with probability b `sampling_prob`,
        independently of the other records and steps, and in no other step (cyclic
        Poisson sampling).

    Args:
      seed: the seed of the run (see `stream_key`).
      step: the update, from 0.
      num_records: N, size of the training set.
      sampling_prob: q in [0, 1], the expected batch size over N.
      bands: b, of a mechanism whose noise is correlated, at most 1 / q.

    Returns:
      Integer indices in [0, N), without repeats, of random length (0 is possible).

    Raises:
      UserError: if b `sampling_prob` is outside [0, 1], `num_records` outside [1,
        2^31), b below 1, or the step below 0.

    Example:
      >>> draw = {"num_records": 1000, "sampling_prob": 0.1}
      >>> batch = dpm.poisson_batch(1234, 7, **draw)  # about 100 of them
      >>> bool((batch == dpm.poisson_batch(1234, 7, **draw)).all())
      True
    """
    require(operator.index(step) >= 0, "step", step, "at least 0")
    countable = 1 <= num_records < 2**31
    require(countable, "num_records", num_records, "at least 1 and below 2^31")
    require(0 <= sampling_prob <= 1, "sampling_prob", sampling_prob, "in [0, 1]")
    require(bands >= 1, "bands", bands, "at least 1")
    most = f"at most 1 / bands = {1 / bands:.4g}"
    require(bands * sampling_prob <= 1, "sampling_prob", sampling_prob, most)
    # One iteration of jax_privacy's sampler, with a generator of this step alone, draws
    # the batch of step t without the t batches before it.
    strategy = batch_selection.CyclicPoissonSampling(
        sampling_prob=bands * sampling_prob, iterations=1
    )
    there = np.arange(num_records)
    if bands > 1:
        turns = generator(seed, "turns").integers(bands, size=num_records)
        there = np.flatnonzero(turns == step % bands)
        if not len(there):
            return there.astype(np.int32)
    drawn = strategy.batch_iterator(len(there), rng=generator(seed, "sampling", step))
    return there[next(iter(drawn))].astype(np.int32)


def allocated_batch(
    seed: int, step: int, *, num_records: int, batches_per_epoch: int
) -> np.ndarray:
    """Draws the records of update `step`: those that its epoch allocates to it.

    Random allocation (balls in bins): in an epoch of t batches all records are used, as
    by a shuffled loader, but their places are independent, as under Poisson sampling.
    (A shuffled loader has batches of one size, so where a record is depends on the
    others.) Its epsilon is that of `allocation`.

    Formal guarantees:
      - Every record is in exactly one of the batches of an epoch, in each with the same
        probability, independently of the other records and of the other epochs.
      - The batch is a pure function of the arguments.
      - The place of a record does not depend on the number of records: with one more
        at the end, the others stay where they are.

    Args:
      seed: the seed of the run (see `sampling.stream_key`).
      step: the update, from 0; its epoch is `step // batches_per_epoch`.
      num_records: N, size of the training set.
      batches_per_epoch: t, so that N / t records are expected in a batch.

    Returns:
      Increasing int32 indices in [0, N), of random length (0 is possible).

    Raises:
      UserError: for a negative step, or no records or batches.

    Example:
      >>> draw = {"num_records": 1000, "batches_per_epoch": 10}
      >>> epoch = [dpm.sampling.allocated_batch(1234, t, **draw) for t in range(10)]
      >>> sorted(np.concatenate(epoch)) == list(range(1000))
      True
    """
    require(operator.index(step) >= 0, "step", step, "at least 0")
    require(num_records >= 1, "num_records", num_records, "at least 1")
    least = "at least 1"
    require(batches_per_epoch >= 1, "batches_per_epoch", batches_per_epoch, least)
    epoch, place = divmod(step, batches_per_epoch)
    rng = generator(seed, "allocation", epoch)
    places = rng.integers(batches_per_epoch, size=num_records)
    return np.flatnonzero(places == place).astype(np.int32)


def microbatches(indices: np.ndarray, microbatch_size: int) -> list[np.ndarray]:
    """Splits a batch into microbatches of one fixed shape, so that nothing recompiles.

    Args:
      indices: [n] integer indices of records; n may be 0.
      microbatch_size: m.

    Returns:
      ceil(n / m) arrays [m], the last one padded with -1; none for n = 0. Do not index
      with -1, which is the last record: see `batches`.

    Raises:
      UserError: for a size below 1.
    """
    require(microbatch_size >= 1, "microbatch_size", microbatch_size, "at least 1")
    if indices.size == 0:
        return []
    return batch_selection.split_and_pad_global_batch(indices, microbatch_size)


def batches(
    seed: int,
    *,
    num_records: int,
    sampling_prob: float,
    microbatch_size: int,
    bands: int = 1,
    allocated: bool = False,
) -> Callable[[int], list[Any]]:
    """Returns the function from an update to the microbatches of its batch.

    Args:
      seed: of the run.
      num_records: N.
      sampling_prob: q.
      microbatch_size: m.
      bands: b, see `poisson_batch`.
      allocated: whether batches are `allocated_batch`, 1 / q of them in an epoch.

    Returns:
      `f(step)`, a list of masked int32 arrays [m]: `.data` are the indices, -1 in
      padding, and `.mask` is the `is_padding_example` of a clipped sum. JAX raises an
      error for the masked array itself, so that nobody takes padding for a record.

    Raises:
      UserError: for random allocation with bands, or with q that is not one over a
        whole number. `f` raises it as `poisson_batch` or `allocated_batch` does.

    Example:
      >>> batches = dpm.batches(
      ...     1234, num_records=1000, sampling_prob=0.1, microbatch_size=64
      ... )
      >>> {part.shape for step in range(3) for part in batches(step)}
      {(64,)}
    """

    if allocated:
        require(bands == 1, "bands", bands, "1 for random allocation")
        batches_per_epoch = allocation.batches_per_epoch(sampling_prob)

    def draw(step: int) -> np.ndarray:
        if allocated:
            return allocated_batch(
                seed,
                step,
                num_records=num_records,
                batches_per_epoch=batches_per_epoch,
            )
        return poisson_batch(
            seed,
            step,
            num_records=num_records,
            sampling_prob=sampling_prob,
            bands=bands,
        )

    def masked(step: int) -> list[np.ma.MaskedArray]:
        parts = microbatches(draw(step), microbatch_size)
        return [np.ma.MaskedArray(part, mask=part < 0) for part in parts]

    return masked
