"""Clipped sums of neighbouring batches on the devices of this process, for the tests.

    python -m tests.clipped_sums OUT.npz [COORDINATOR NUM_PROCESSES PROCESS_ID]

`sums` is also called in the process of the tests themselves, on one device.
"""

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dpmix_jax import AugmentationConfig, MethodConfig, augmentation_set, make_bank
from dpmix_jax.gradients import clipped_gradient
from dpmix_jax.mixup import METHODS, OF_GROUPS, WITH_PUBLIC, group_set
from dpmix_jax.training import (
    Accumulate,
    init_totals,
    make_mesh,
    put,
    sum_over_devices,
)
from tests import toy

CLIP_NORM = 0.05  # below every norm: nothing hides behind an idle clip
NUM, CHANGED = 8, 5
BAD = {"nan": np.nan, "inf": np.inf, "huge": 1e30}
# Drawn by class, public images depend on a private label, and must stay in its term.
DRAWS = {"pure_dp_mix_diff": "class"}


# On several devices and processes: of the other methods only the sets differ, which are
# made before anything is summed.
ON_MANY = ("dp_sgd", "dp_mix_diff", "microbatch_mixup")


def sums(methods: Sequence[str] = METHODS) -> dict[str, np.ndarray]:
    """Returns flat clipped sums by `method/variant`, the same on every process.

    Variants: all 8 records (`base`; in groups of two for `microbatch_mixup`), one of
    them absent (`removed`), or with other pixels and another label (`replaced`, and
    `nan`, `inf`, `huge` as float pixels); the first three also with other public images
    (`other_bank_...`).
    """
    found = {}
    params = toy.init_params()
    gradient_fn = clipped_gradient(toy.loss_fn, l2_clip_norm=CLIP_NORM)
    mesh = make_mesh()
    replicated = NamedSharding(mesh, PartitionSpec())
    spread = NamedSharding(mesh, PartitionSpec("records"))
    params = jax.device_put(params, replicated)
    data = toy.records(NUM)
    other = toy.records(NUM)
    other.images[CHANGED] = 255 - other.images[CHANGED]
    other.labels[CHANGED] = (other.labels[CHANGED] + 1) % toy.NUM_CLASSES
    everyone = np.arange(NUM, dtype=np.int32)
    without = np.where(everyone == CHANGED, -1, everyone)
    key = jax.random.key(7)
    for name in methods:
        record_set = make_record_set(name, data.normalize)
        takes_bank, grouped = name in WITH_PUBLIC, name in OF_GROUPS
        bank = toy.bank() if takes_bank else None

        def make(records, bank, record_set=record_set):
            return Accumulate(
                gradient_fn,
                record_set,
                records,
                mesh,
                key=key,
                l2_clip_norm=CLIP_NORM,
                bank=bank,
            )

        first = make(data, bank)

        def in_groups(array, grouped=grouped):
            return array.reshape(-1, 2, *array.shape[1:]) if grouped else array

        def run(accumulate, indices, first=first, in_groups=in_groups):
            step = jax.device_put(jnp.int32(3), replicated)
            batch = accumulate.place(in_groups(indices))
            totals = init_totals(params, mesh)
            # Records and bank are arguments of what `first` compiles, once for all.
            shared = (params, step, accumulate._fixed)
            return toy.flat(first._accumulate(shared, batch, totals).gradients)

        banks = {"": bank}
        if takes_bank:
            banks["other_bank_"] = toy.bank(seed=2)
        for prefix, drawn_from in banks.items():
            accumulate = make(data, drawn_from)
            found[f"{name}/{prefix}base"] = run(accumulate, everyone)
            found[f"{name}/{prefix}removed"] = run(accumulate, without)
            found[f"{name}/{prefix}replaced"] = run(make(other, drawn_from), everyone)

        if jax.process_count() > 1:  # what follows was compiled for devices already
            continue

        def float_sum(shared, records, record_set=record_set):
            params, bank = shared
            images, labels, words = records
            keys = jax.random.wrap_key_data(words)
            sets = jax.vmap(record_set, in_axes=(0, 0, 0, None))
            return gradient_fn(params, *sets(keys, images, labels, bank))[0]

        float_sum = jax.jit(sum_over_devices(float_sum, mesh))
        words = jax.random.key_data(jax.random.split(key, NUM))
        labels = jax.nn.one_hot(data.labels, toy.NUM_CLASSES)
        pixels = np.asarray(data.normalize(jnp.asarray(data.images)))
        for variant, value in {"float": None, **BAD}.items():
            spoiled = pixels.copy()
            if value is not None:
                spoiled[CHANGED, 1:3] = value
            arrays = [
                put(in_groups(np.asarray(a)), spread) for a in (spoiled, labels, words)
            ]
            found[f"{name}/{variant}"] = toy.flat(float_sum((params, bank), arrays))
    return found


def make_record_set(name, normalize):
    method = MethodConfig(
        name=name, k_base=3, k_self=2, draw=DRAWS.get(name, "uniform")
    )
    if method.mixes_records:
        return group_set(method, AugmentationConfig(max_shift=1))
    return augmentation_set(
        method, AugmentationConfig(max_shift=1), normalize=normalize
    )


def sums_with_a_leaking_bank() -> dict[str, np.ndarray]:
    """Sums of `dp_mix_diff` whose bank is made of the private records of the batch."""
    gradient_fn = clipped_gradient(toy.loss_fn, l2_clip_norm=CLIP_NORM)
    data = toy.records(NUM)
    record_set = make_record_set("dp_mix_diff", data.normalize)
    keys = jax.random.split(jax.random.key(7), NUM)

    @jax.jit
    def total(params, images, labels, bank):
        sets = jax.vmap(record_set, in_axes=(0, 0, 0, None))
        targets = jax.nn.one_hot(labels, toy.NUM_CLASSES)
        return gradient_fn(params, *sets(keys, data.normalize(images), targets, bank))[
            0
        ]

    def of(labels):
        bank = make_bank(data.images, labels, data.class_names)
        return toy.flat(total(toy.init_params(), data.images, labels, bank))

    replaced = data.labels.copy()
    replaced[CHANGED] = (replaced[CHANGED] + 1) % toy.NUM_CLASSES
    return {"leak/base": of(data.labels), "leak/replaced": of(replaced)}


def unsafe_shard_map_sums() -> dict[str, np.ndarray]:
    """Sums by `jax.shard_map` with its defaults, which adds up before the clip."""
    gradient_fn = clipped_gradient(toy.loss_fn, l2_clip_norm=CLIP_NORM)
    images = jax.random.normal(jax.random.key(0), (NUM, 2, 6, 6, 1))
    labels = jnp.broadcast_to(jnp.eye(3)[1], (NUM, 2, 3))
    spread = PartitionSpec("records")

    @jax.jit
    @jax.shard_map(
        mesh=make_mesh(),
        in_specs=(PartitionSpec(), spread, spread),
        out_specs=PartitionSpec(),
    )
    def total(params, images, labels):
        return jax.lax.psum(gradient_fn(params, images, labels)[0], "records")

    # A record with a large gradient the other way turns that of its fellows around.
    replaced = labels.at[CHANGED].multiply(-1000.0)
    return {
        f"shard_map/{name}": toy.flat(total(toy.init_params(), images, value))
        for name, value in (("base", labels), ("replaced", replaced))
    }


def main(out: str, *coordinates: str) -> None:
    if coordinates:
        address, processes, process = coordinates
        jax.distributed.initialize(address, int(processes), int(process))
    found = sums(ON_MANY)
    if not coordinates:
        found |= unsafe_shard_map_sums()
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
