"""Trains on two processes by the library's own parts, for the tests.

    python -m tests.two_processes FOLDER ADDRESS NUMBER

The first process saves every update into FOLDER and prints its number; a start goes on
from there.
"""

import pathlib
import sys

import jax
import optax

from dpmix_jax import (
    AugmentationConfig,
    Mechanism,
    augmentation_set,
    batches,
    clipped_gradient,
    devices,
    noise_key,
    privatizer,
    stream_key,
    training,
)
from dpmix_jax.run.checkpoint import Checkpoints
from tests import toy

SEED, NUM, Q, T = 5, 40, 0.5, 40
MECHANISM = Mechanism(sampling_prob=Q, num_updates=T, noise_multiplier=1.0)


def main(folder: str, address: str, number: str) -> None:
    jax.distributed.initialize(address, 2, int(number), heartbeat_timeout_seconds=10)
    mesh, data = devices.make_mesh(), toy.records(NUM)
    gradient_fn = clipped_gradient(toy.loss_fn, l2_clip_norm=1.0)
    noise = privatizer(
        gradient_fn, MECHANISM, expected_batch_size=Q * NUM, key=noise_key(SEED)
    )
    optimizer = optax.chain(noise, optax.sgd(0.5))
    sets = training.make_sets(
        augmentation_set(toy.method("dp_mix_self"), AugmentationConfig(max_shift=1)),
        normalize=data.normalize,
        num_classes=toy.NUM_CLASSES,
    )
    drawn = batches(SEED, num_records=NUM, sampling_prob=Q, microbatch_size=8)
    checkpoints = Checkpoints(pathlib.Path(folder))
    initial = training.init_state(toy.init_params(), optimizer)
    for state, _ in training.train(
        checkpoints.restore(initial) or initial,
        training.make_accumulate(
            training.make_clipped_sum(sets, gradient_fn, l2_clip_norm=1.0), mesh
        ),
        training.make_update(optimizer, ema_decay=0.9),
        training.put_inputs(
            stream_key(SEED, "augmentation"), mesh, records=(data.images, data.labels)
        ),
        mesh=mesh,
        batches=lambda step: (training.put_batch(b.data, mesh) for b in drawn(step)),
        num_updates=T,
    ):
        if jax.process_index() == 0:
            checkpoints.save(state)
            print(int(state.step), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
