"""What a run would cost, told without touching data."""

import time

import jax
import numpy as np

from dpmix_jax import data, training
from dpmix_jax.data.public import blank_public
from dpmix_jax.progress import duration, say
from dpmix_jax.run import build, embeddings, performance
from dpmix_jax.run.config import ExperimentConfig


def dry_run(config: ExperimentConfig) -> str:
    """Calibrates, compiles, and times a microbatch of blank images on this device.

    Args:
      config: of a run. Files of the user's own (`npz`, `folder`) are read as a run
        reads them, to learn how many they are; of other datasets that is known.

    Returns:
      Lines of text: noise, budget, work, memory, and estimated hours.

    Raises:
      UserError: for a config that cannot run here.
    """
    records = data.blank(config.data)
    public = blank_public(config.public, config.data, records)
    config.augmentation.check_images(records.image_shape)
    config.performance.check_devices(jax.device_count())
    q = config.privacy.sampling_prob(len(records))
    model = build.classifier(config, records)
    given = config.finetune.load(model.shapes)
    say("calibrating the noise")
    mechanism = config.privacy.calibrate(q)
    parts = build.build(
        config, model, given, records, mechanism=mechanism, seed=0, public=public
    )
    if config.finetune.embeddings == "kept":
        rows = embeddings.blank_rows(parts, config, model, len(records))
        parts = embeddings.on_kept(parts, config, model, rows, seed=0)
    say("compiling and timing a microbatch")
    with performance.explained_out_of_memory(config.performance):
        size = parts.microbatch_size(config.performance)
        seconds = _seconds_of_update(parts, size, q * len(records))
    batch, updates = config.privacy.expected_batch_size, config.privacy.num_updates
    facts = {
        "guarantee": f"({mechanism.epsilon(config.privacy.delta):.4g},"
        f" {config.privacy.delta:g})-DP, {config.privacy.neighboring_relation}",
        "noise": f"sigma = {mechanism.noise_multiplier:.5g},"
        f" C = {config.privacy.l2_clip_norm:g}",
        "updates": f"{updates:,} of {batch:,} expected records, q = {q:.5g}",
        "images": f"{batch * config.method.set_size:,} an update"
        f" (K = {config.method.set_size}, {config.method.name})",
        "parameters": f"{sum(x.size for x in jax.tree.leaves(parts.state.params)):,}"
        " to be trained",
        "memory": f"{parts.bytes_needed(size) / 2**30:.2f} GiB a device for"
        f" microbatches of {size} records",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "time": f"{seconds:.3g} s an update, {seconds * updates / 3600:.3g} h"
        f" ({duration(seconds * updates)}), without evaluations",
    }
    return "\n".join(f"{name:<11} {text}" for name, text in facts.items())


def _seconds_of_update(parts: build.Parts, size: int, expected: float) -> float:
    """Estimates an update from a microbatch and what follows the sum."""
    state = parts.state
    batch = parts.put(np.maximum(parts.terms.padding(size), 0))

    def once(count: int) -> float:
        sums = training.init_sums(state.params, parts.mesh)
        start = time.perf_counter()
        for _ in range(count):
            sums = parts.accumulate(sums, state.params, state.step, batch, parts.inputs)
        jax.block_until_ready(parts.apply_update(state, sums.gradients))
        return time.perf_counter() - start

    once(1)  # compiles
    one, three = once(1), once(3)
    each = max(three - one, 0.0) / 2
    return one - each + each * max(expected / size, 1.0)
