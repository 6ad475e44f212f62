"""What a run would cost, told without looking at the images of known datasets."""

import dataclasses
import time

import jax
import numpy as np

from dpmix_jax import accounting, data
from dpmix_jax.data.public import blank_public
from dpmix_jax.models.classifier import Classifier
from dpmix_jax.progress import duration, say
from dpmix_jax.run import build, embeddings, performance, targets
from dpmix_jax.run.config import ExperimentConfig


def dry_run(config: ExperimentConfig, target: str | None = None) -> str:
    """Calibrates, compiles, and times a microbatch of blank images on this device.

    Args:
      config: of a run. Files of the user's own (`npz`, `folder`, `hf:`) are read as a
        run reads them, to learn how many they are; of other datasets that is known.
      target: one of `targets.TARGETS`, to compile for such a device, which need not be
        here. Nothing is timed then.

    Returns:
      Lines of text: noise, budget, work, memory, and estimated hours; for a target
      kernels and red flags in the place of hours.

    Raises:
      UserError: for a config that cannot run here, or a target that cannot be compiled
        for.
    """
    if target is not None:
        mesh = targets.TARGETS[target].mesh()
    records = data.blank(config.data)
    config.augmentation.check_images(records.image_shape)
    config.performance.check_devices(jax.device_count())
    q = config.privacy.sampling_prob(len(records))
    model = build.classifier(config, records)
    say("calibrating the noise")
    mechanism = config.privacy.calibrate(q)
    built = config
    if target is not None:
        config = targets.for_target(config, model, targets.TARGETS[target])
        on_host = dataclasses.replace(config.performance, dataset_on="host")
        built = dataclasses.replace(config, performance=on_host)
    parts = _parts(built, model, records, mechanism)
    if target is None:
        cost = _cost_here(parts, config, q * len(records))
    else:
        say("compiling a microbatch")
        cost = targets.facts(parts, config, target, mesh)
    batch, updates = config.privacy.expected_batch_size, config.privacy.num_updates
    facts = {
        "guarantee": f"({mechanism.epsilon(config.privacy.delta):.4g},"
        f" {config.privacy.delta:g})-DP, {config.privacy.neighboring_relation}",
        "noise": f"sigma = {mechanism.noise_multiplier:.5g},"
        f" C = {config.privacy.l2_clip_norm:g}"
        + f", {mechanism.bands} bands"
        * (mechanism.bands > 1),
        "updates": f"{updates:,} of {batch:,} expected records, q = {q:.5g}",
        "images": f"{batch * config.method.set_size:,} an update"
        f" (K = {config.method.set_size}, {config.method.name})",
        "parameters": f"{sum(x.size for x in jax.tree.leaves(parts.state.params)):,}"
        " to be trained",
        **cost,
    }
    return "\n".join(f"{name:<11} {text}" for name, text in facts.items())


def seconds_an_update(config: ExperimentConfig) -> float:
    """Times a microbatch of blank images on this device, and estimates an update.

    Raises:
      UserError: for a config that cannot run here.
    """
    records = data.blank(config.data)
    config.augmentation.check_images(records.image_shape)
    config.performance.check_devices(jax.device_count())
    mechanism = accounting.Mechanism(
        sampling_prob=config.privacy.sampling_prob(len(records)),
        num_updates=config.privacy.num_updates,
        noise_multiplier=1.0,  # of no account for the time
    )
    parts = _parts(config, build.classifier(config, records), records, mechanism)
    with performance.explained_out_of_memory(config.performance):
        size = parts.microbatch_size(config.performance)
        return _seconds_of_update(parts, size, config.privacy.expected_batch_size)


def _parts(
    config: ExperimentConfig,
    model: Classifier,
    records: data.Records,
    mechanism: accounting.Mechanism,
) -> build.Parts:
    """Returns the parts of a run on blank records, embedded ones if it keeps them."""
    given = config.finetune.load(model.shapes)
    public = blank_public(config.public, config.data, records)
    parts = build.build(
        config, model, given, records, mechanism=mechanism, seed=0, public=public
    )
    if config.finetune.embeddings != "kept":
        return parts
    rows = embeddings.blank_rows(parts, config, model, len(records))
    return embeddings.on_kept(parts, config, model, rows, seed=0)


def _cost_here(
    parts: build.Parts, config: ExperimentConfig, expected: float
) -> dict[str, str]:
    say("compiling and timing a microbatch")
    with performance.explained_out_of_memory(config.performance):
        size = parts.microbatch_size(config.performance)
        seconds = _seconds_of_update(parts, size, expected)
    total = seconds * config.privacy.num_updates
    return {
        "memory": f"{parts.bytes_needed(size) / 2**30:.2f} GiB a device for"
        f" microbatches of {size} records",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "time": f"{seconds:.3g} s an update, {total / 3600:.3g} h"
        f" ({duration(total)}), without evaluations",
    }


def _seconds_of_update(parts: build.Parts, size: int, expected: float) -> float:
    """Estimates an update from a microbatch and what follows the sum."""
    state = parts.state
    batch = parts.put(np.maximum(parts.terms.padding(size), 0))

    def once(count: int) -> float:
        sums = parts.init_sums()
        start = time.perf_counter()
        for _ in range(count):
            sums = parts.accumulate(sums, state.params, state.step, batch, parts.inputs)
        jax.block_until_ready(parts.apply_update(state, sums.gradients))
        return time.perf_counter() - start

    once(1)  # compiles
    one, three = once(1), once(3)
    each = max(three - one, 0.0) / 2
    return one - each + each * max(expected / size, 1.0)
