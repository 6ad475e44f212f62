"""Embeddings that are kept: a frozen encoder runs once over M sets of each record.

`keep` embeds the sets that updates 0 to M - 1 of a run with fresh embeddings would make
of every record, one row a set. From then on the rows are the data: an update draws one
of the M rows of each record of its batch (`rows_of`), and looks it up (`sets`).
"""

import itertools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpmix_jax import devices, sampling, training
from dpmix_jax.files import naming
from dpmix_jax.progress import bar

PyTree = Any
Embed = Callable[[jax.Array, training.Batch, training.Inputs], tuple[jax.Array, ...]]

_LARGEST = float(np.finfo(np.float16).max)


def make_embed(
    sets: training.MakeSets,
    encode: Callable[[PyTree, jax.Array], jax.Array],
    mesh: jax.sharding.Mesh,
) -> Embed:
    """Compiles the embedding of the sets of a microbatch.

    Formal guarantees:
      - Record i's row depends on record i, its index, the step, the key, the encoder
        and the public pool alone, on no other record.

    Args:
      sets: from `training.make_sets`.
      encode: `f(frozen parameters, images [n, H, W, C]) -> [n, ...]`, each of its image
        alone.
      mesh: from `devices.make_mesh`.

    Returns:
      `f(step, batch, inputs) -> (embeddings float16 [m, K * E], soft labels float32
      [m, K, O])`, E the size of one embedding; the one constant of the inputs, if any,
      is the tree of frozen parameters. What is beyond float16 becomes its largest
      number.
    """

    def embed(step, batch, inputs):
        images, labels, _ = sets(step, batch, inputs)
        records, _, *shape = images.shape
        frozen = inputs.constants[0] if inputs.constants else {}
        found = encode(frozen, images.reshape(-1, *shape))
        found = jnp.clip(found.astype(jnp.float32), -_LARGEST, _LARGEST)
        found = found.reshape(records, -1)
        return found.astype(jnp.float16), labels.astype(jnp.float32)

    return jax.jit(
        jax.shard_map(
            embed,
            mesh=mesh,
            in_specs=(devices.EVERYWHERE, devices.SPREAD, devices.EVERYWHERE),
            out_specs=devices.SPREAD,
            check_vma=False,
        )
    )


def row_type(embed: Embed, batch: training.Batch, inputs: training.Inputs) -> np.dtype:
    """Returns the type of a row: `embeddings` [K * E] and `labels` [K, O].

    Args:
      embed: from `make_embed`.
      batch: any microbatch.
      inputs: of the run.
    """
    parts = jax.eval_shape(embed, jnp.int32(0), batch, inputs)
    names = ("embeddings", "labels")
    return np.dtype(
        [(n, x.dtype, x.shape[1:]) for n, x in zip(names, parts, strict=True)]
    )


def keep(
    path: pathlib.Path,
    embed: Embed,
    put: Callable[[np.ndarray], training.Batch],
    inputs: training.Inputs,
    *,
    num_records: int,
    num_sets: int,
    microbatch_size: int,
    stop: Callable[[], bool] = lambda: False,
) -> np.ndarray | None:
    """Embeds M sets of every record, or goes on with it, or finds that it is done.

    Args:
      path: of the file, which only its owner may read: embeddings are as private as
        the records.
      embed: from `make_embed`.
      put: puts a microbatch of indices on the devices.
      inputs: of the run.
      num_records: N.
      num_sets: M.
      microbatch_size: m, records that are embedded before they are written.
      stop: asked before each microbatch; once true, what was done stays for the next
        call.

    Returns:
      A memory map of rows [M * N] of `row_type`, of which row j * N + i is set j of
      record i; None if stopped.
    """
    row = row_type(embed, put(np.full(microbatch_size, -1)), inputs)
    whole = num_sets * num_records * row.itemsize
    if not path.exists() or path.stat().st_size != whole:
        partial = path.with_name(f"{path.name}.partial")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(partial, flags, 0o600)
        with naming(partial), open(descriptor, "r+b") as file:
            os.fchmod(descriptor, 0o600)  # of a file that was there before
            if os.fstat(descriptor).st_size > whole:  # of another run
                file.truncate(0)
            written = os.fstat(descriptor).st_size // row.itemsize
            starts = range(0, num_records, microbatch_size)
            total = num_sets * num_records
            with bar(
                desc="embedding", unit=" sets", total=total, initial=written
            ) as progress:
                for j, i in itertools.product(range(num_sets), starts):
                    indices = np.arange(i, i + microbatch_size)
                    indices[indices >= num_records] = -1
                    rows = np.zeros(np.count_nonzero(indices >= 0), row)
                    first = j * num_records + i
                    if first + len(rows) <= written:
                        continue
                    if stop():
                        return None
                    found = embed(jnp.int32(j), put(indices), inputs)
                    for name, array in zip(row.names or (), found, strict=True):
                        rows[name] = np.asarray(array)[: len(rows)]
                    file.seek(first * row.itemsize)
                    file.write(rows.tobytes())
                    progress.update(first + len(rows) - progress.n)
            file.flush()
            os.fsync(descriptor)
        os.replace(partial, path)
    return np.memmap(path, row, "r", shape=(num_sets * num_records,))


def rows_of(
    microbatches: list[np.ndarray],
    *,
    seed: int,
    step: int,
    num_records: int,
    num_sets: int,
) -> list[np.ndarray]:
    """Draws for update `step` which of the M sets of each record stands for it.

    Formal guarantees:
      - The draw of record i depends on the seed, the step and i alone.

    Args:
      microbatches: indices of records, -1 for padding.
      seed: of the run.
      step: the update.
      num_records: N.
      num_sets: M.

    Returns:
      Rows in [0, M * N) of what `keep` returns, -1 for padding.
    """
    drawn = sampling.generator(seed, "sets", step).integers(num_sets, size=num_records)
    rows = drawn * num_records + np.arange(num_records)
    return [np.where(part < 0, -1, rows[part]) for part in microbatches]


def sets(
    step: jax.Array, batch: training.Batch, inputs: training.Inputs
) -> training.Sets:
    """Looks up the kept sets of a microbatch: a `training.MakeSets`.

    Formal guarantees:
      - Record i's set is the row that was drawn for it, and no other.

    Rows are flat, and looked up on their own, before anything is computed of them: so
    an update takes a CPU a third of the time.

    Args:
      step: not used, the rows are drawn already.
      batch: rows from `rows_of` in the place of indices.
      inputs: with the columns of `keep`'s rows as records.

    Returns:
      Embeddings [m, K, E] in the place of images.
    """
    del step
    embeddings, labels = training.look_up(batch, inputs)
    embeddings = jax.lax.optimization_barrier(embeddings.astype(jnp.float32))
    embeddings = embeddings.reshape(*labels.shape[:2], -1)
    present = (batch.indices >= 0).astype(jnp.float32)
    return training.Sets(embeddings, labels, present)
