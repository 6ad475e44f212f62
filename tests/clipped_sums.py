"""Clipped sums of neighbouring batches on the devices of this process, for the tests.

    python -m tests.clipped_sums OUT.npz [COORDINATOR NUM_PROCESSES PROCESS_ID]

`sums` is also called in the process of the tests themselves, on one device.
"""

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dpmix_jax import (
    AugmentationConfig,
    augmentation_set,
    clipped_gradient,
    devices,
    training,
)
from dpmix_jax.baselines import microbatch_mixup
from dpmix_jax.mixup import METHODS
from dpmix_jax.models import kept
from tests import toy

CLIP_NORM = 0.05  # below every norm: nothing hides behind an idle clip
NUM, CHANGED = 8, 5
GROUPS = microbatch_mixup.NAME
WITH_PUBLIC = ("dp_mix_diff", "pure_dp_mix_diff")
BAD = {"nan": np.nan, "inf": np.inf, "huge": 1e30}
# Drawn by class, public images depend on a private label, and must stay in its term.
OPTIONS = {"pure_dp_mix_diff": {"draw": "class", "k_self": 0}}
# Methods by how many processes there are and devices of each: of those left out only
# the sets differ, which are made before anything is summed.
METHODS_ON = {
    "one device": (*METHODS, GROUPS),
    "four devices": ("dp_sgd", "pure_dp_mix_diff", GROUPS),
    "two processes": ("dp_sgd", "pure_dp_mix_diff"),
}
SOME = AugmentationConfig(max_shift=1)
DATA = toy.records(NUM)


def make_record_set(name):
    if name == GROUPS:
        method = microbatch_mixup.MicrobatchMixupConfig(k_base=3)
        return microbatch_mixup.group_set(method, SOME)
    return augmentation_set(
        toy.method(name, **OPTIONS.get(name, {})), SOME, normalize=DATA.normalize
    )


def make_sets(name):
    return training.make_sets(
        make_record_set(name),
        normalize=lambda images: images,  # pixels that are no numbers
        num_classes=toy.NUM_CLASSES,
    )


def variants() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Indices, images and labels of a batch and of its neighbours."""
    everyone = np.arange(NUM)
    images = np.asarray(DATA.normalize(jnp.asarray(DATA.images)))
    found = {
        "base": (everyone, images, DATA.labels),
        "removed": (np.where(everyone == CHANGED, -1, everyone), images, DATA.labels),
    }
    others = DATA.labels.copy()
    others[CHANGED] = (others[CHANGED] + 1) % toy.NUM_CLASSES
    replaced = images.copy()
    replaced[CHANGED] *= -1
    found["replaced"] = (everyone, replaced, others)
    for name, value in BAD.items():
        spoiled = images.copy()
        spoiled[CHANGED, 1:3] = value
        found[name] = (everyone, spoiled, DATA.labels)
    return found


def sums(methods: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns flat clipped sums by `method/variant`, the same on every process.

    Variants: all 8 records (`base`; in groups of two for `microbatch_mixup`), one of
    them absent (`removed`), or with other pixels and another label (`replaced`, and
    `nan`, `inf`, `huge` by its pixels alone), each also with other public images
    (`other_pool_...`). `host` is `base` with records that come from the host.
    """
    mesh = devices.make_mesh()
    params = devices.put_everywhere(toy.init_params(), mesh)
    gradient_fn = clipped_gradient(toy.loss_fn, l2_clip_norm=CLIP_NORM)
    batches, found = variants(), {}
    for method in methods:
        accumulate = training.make_accumulate(
            training.make_clipped_sum(
                make_sets(method), gradient_fn, l2_clip_norm=CLIP_NORM
            ),
            mesh,
        )

        def total(indices, records, pool, host=(), method=method, f=accumulate):
            if method == GROUPS:
                indices = indices.reshape(-1, 2)
            sums = f(
                training.init_sums(params, mesh),
                params,
                devices.put_everywhere(jnp.int32(3), mesh),
                training.put_batch(indices, mesh, host),
                training.put_inputs(
                    jax.random.key(7), mesh, records=records, pool=pool
                ),
            )
            return toy.flat(sums.gradients)

        pools = {"": None}
        if method in WITH_PUBLIC:
            pools = {"": toy.pool(NUM), "other_pool_": toy.pool(NUM, seed=2)}
        for prefix, pool in pools.items():
            for variant, (indices, *records) in batches.items():
                name = f"{method}/{prefix}{variant}"
                found[name] = total(indices, tuple(records), pool)
        indices, *records = batches["base"]
        if method == "dp_sgd":
            found[f"{method}/host"] = total(indices, (), None, tuple(records))
    return found


def rows() -> dict[str, np.ndarray]:
    """Returns kept embeddings by `rows/variant`, of `base` and of `replaced`."""
    mesh, found = devices.make_mesh(), {}
    embed = kept.make_embed(
        make_sets("dp_mix_self"), lambda _, images: jnp.tanh(images.mean((1, 3))), mesh
    )
    for variant, (indices, *records) in variants().items():
        if variant in ("base", "replaced"):
            embeddings, _ = embed(
                devices.put_everywhere(jnp.int32(3), mesh),
                training.put_batch(indices, mesh),
                training.put_inputs(jax.random.key(7), mesh, records=tuple(records)),
            )
            found[f"rows/{variant}"] = np.asarray(embeddings)
    return found


def unsafe_shard_map_sums() -> dict[str, np.ndarray]:
    """Sums by `jax.shard_map` with its defaults, which adds up before the clip."""

    def loss_fn(params, labels):
        return -(params * labels).sum()

    gradient_fn = clipped_gradient(loss_fn, l2_clip_norm=CLIP_NORM)
    spread = PartitionSpec("records")

    @jax.jit
    @jax.shard_map(
        mesh=devices.make_mesh(),
        in_specs=(PartitionSpec(), spread),
        out_specs=PartitionSpec(),
    )
    def total(params, labels):
        return jax.lax.psum(gradient_fn(params, labels)[0], "records")

    # A record with a large gradient the other way turns that of its fellows around.
    labels = jnp.ones((NUM, 3))
    replaced = labels.at[CHANGED].multiply(-1000.0)
    return {
        f"shard_map/{name}": toy.flat(total(jnp.zeros(3), value))
        for name, value in (("base", labels), ("replaced", replaced))
    }


def main(out: str, *coordinates: str) -> None:
    if coordinates:
        address, processes, process = coordinates
        jax.distributed.initialize(address, int(processes), int(process))
        found = sums(METHODS_ON["two processes"])
    else:
        found = sums(METHODS_ON["four devices"]) | unsafe_shard_map_sums() | rows()
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
