"""Table 13: what fine-tuning costs by method, on images and weights that are random.

    python experiments/table13.py --config=configs/vit_b16.py:caltech256-2 --records=2

Times what one update adds to its sum for `--records` records: sets, forward pass,
gradients of what is trained, clip and sum. Beside it the forward pass alone, of the
model or of an encoder that is frozen, on as many images: the rest is what privacy,
augmentation and mixing cost. Each method takes the sets of the config, by default K =
16, 34 and 36. Hours are those of all its updates, reckoned from the time of a record.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from absl import flags

from dpmix_jax import accounting, data
from dpmix_jax.data.public import PublicConfig
from dpmix_jax.errors import require
from dpmix_jax.mixup import METHODS, MethodConfig
from dpmix_jax.models import finetune
from dpmix_jax.run import build, cli
from dpmix_jax.run.config import ExperimentConfig, check_flags, from_config_dict

TITLES = {
    "Self-Aug": "self_aug",
    "DP-Mix_self": "dp_mix_self",
    "DP-Mix_diff": "dp_mix_diff",
}
POOL = 64  # public images to draw from
PAPER = (
    "The paper's table, ViT-B-16 on Caltech256 on one A100, 245 updates: 2 h 12, 7 h 33"
    " (3.43 x), 7 h 40 (3.48 x)"
)

_CONFIG = cli.define_config()
_RECORDS = flags.DEFINE_integer("records", 2, "At a time.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each row.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Where to write all that was measured.")
cli.define_dry_run()


def random_records(config: ExperimentConfig, count: int, seed: int) -> data.Records:
    """Returns records of random pixels, of the shape of the config's dataset."""
    blank, rng = data.blank(config.data), np.random.default_rng(seed)
    shape = (count, *blank.images.shape[1:])
    return dataclasses.replace(
        blank,
        images=rng.integers(256, size=shape, dtype=np.uint8),
        labels=rng.integers(blank.num_classes, size=count, dtype=np.int32),
    )


def rows_of(
    config: ExperimentConfig, name: str, records: data.Records
) -> tuple[timing.Row, timing.Row]:
    """Returns the rows of a method, compiled: its update, and the model alone."""
    given, (views, public_images, mixes) = config.method, METHODS[TITLES[name]]
    known = isinstance(given, MethodConfig)
    require(known, "method.name", given.name, "a method of single records")
    assert isinstance(given, MethodConfig)
    method = MethodConfig(
        name=TITLES[name],
        k_base=views and given.k_base,
        k_diff=public_images and (given.k_diff or None),
        k_self=mixes and given.k_self,
    )
    public = PublicConfig(name="bank", path="random") if method.num_public else None
    config = dataclasses.replace(config, method=method, public=public)
    model, k = build.classifier(config, records), method.set_size
    parts = build.build(
        config,
        model,
        config.finetune.load(model.shapes),
        records,
        mechanism=accounting.Mechanism(
            sampling_prob=1.0, num_updates=1, noise_multiplier=1.0
        ),
        seed=0,
        public=random_records(config, POOL, seed=1) if public else None,
    )
    state, batch = parts.state, parts.put(np.arange(len(records)))

    def update() -> Any:
        sums = parts.init_sums()
        return parts.accumulate(sums, state.params, state.step, batch, parts.inputs)

    shape = (len(records) * k, *records.image_shape)
    images = jnp.asarray(np.random.default_rng(2).standard_normal(shape, np.float32))
    params = parts.all_params(state.params)
    is_head = finetune.is_head(state.params, parts.frozen)
    forward = jax.jit((is_head and model.encode) or model.logits)

    def row(name: str, function: Callable[[], Any]) -> timing.Row:
        def call():
            return jax.block_until_ready(function())

        call()  # compiles
        return timing.Row(name=name, k=k, call=call)

    alone = row(f"forward, {len(images)} images", lambda: forward(params, images))
    return row(f"{name}, K = {k}", update), alone


def table13() -> dict[str, Any]:
    """Does what the flags say, and returns all that was measured."""
    cli.config_file()
    config, count = from_config_dict(_CONFIG.value), _RECORDS.value
    timing.check_records(count)
    if cli.would(
        f"time {', '.join(TITLES)} of {config.model.name}, and its forward pass alone,"
        f" {count} records at a time, {_ROUNDS.value} rounds"
        + timing.written(_JSON.value)
    ):
        return {}
    environment = timing.environment()
    records = random_records(config, count, seed=0)
    workload = (
        f"{config.model.name}, {'x'.join(map(str, records.image_shape))},"
        f" {records.num_classes} classes, trainable {config.finetune.trainable},"
        f" {config.performance.precision}, {count} records at a time,"
        f" {_ROUNDS.value} paired rounds: medians (least to greatest)"
    )
    print(workload, flush=True)
    pairs = [rows_of(config, name, records) for name in TITLES]
    timing.measure([row for pair in pairs for row in pair], _ROUNDS.value)
    updates = config.privacy.num_updates
    num_records = updates * config.privacy.expected_batch_size
    rows = []
    for step, forward in pairs:
        assert step.median is not None
        rows.append(
            {
                "name": step.name,
                "k": step.k,
                "ratio_to_self_aug": step.over(pairs[0][0]),
                "ratio_to_forward": step.over(forward),
                "median_seconds": step.median,
                "images_per_second": count * step.k / step.median,
                "hours": num_records / count * step.median / 3600,
                "seconds": step.seconds,
                "forward_seconds": forward.seconds,
            }
        )
    columns: timing.Columns = {
        "": ("name", str),
        "x Self-Aug": ("ratio_to_self_aug", timing.ratio),
        "x forward alone": ("ratio_to_forward", timing.ratio),
        "seconds": ("median_seconds", "{:.3g}".format),
        "images/s": ("images_per_second", "{:,.1f}".format),
        f"hours, {updates} updates": ("hours", "{:.3g}".format),
    }
    print(f"\n{timing.table(columns, rows)}\n\n{PAPER}")
    return {"environment": environment, "workload": workload, "rows": rows}


if __name__ == "__main__":
    cli.start(lambda: timing.run(_JSON.value, table13), check=check_flags)
