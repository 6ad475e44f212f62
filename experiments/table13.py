"""Table 13: what fine-tuning costs by method, on images and weights that are random.

    python experiments/table13.py --config=configs/vit_b16.py:caltech256-2 --records=2

Times what one update adds to its sum for `--records` records: sets, forward pass,
gradients of what is trained, clip and sum. Beside it the forward pass alone, of the
model or of an encoder that is frozen, on as many images: the rest is what privacy,
augmentation and mixing cost. Each method takes the sets of the config, by default K =
16, 34 and 36. Hours are those of all its updates, reckoned from the time of a record.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from absl import app, flags, logging

from dpmix_jax import command_line, data, privacy, training
from dpmix_jax.config import ExperimentConfig, check_flags, from_config_dict
from dpmix_jax.data.public import PublicConfig
from dpmix_jax.errors import UserError
from dpmix_jax.pipeline import Model, Pipeline

METHODS = {
    "Self-Aug": "self_aug",
    "DP-Mix_self": "dp_mix_self",
    "DP-Mix_diff": "dp_mix_diff",
}
POOL = 64  # public images to draw from

_CONFIG = command_line.define_config()
_RECORDS = flags.DEFINE_integer("records", 2, "At a time.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each row.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Where to write all that was measured.")


@dataclasses.dataclass
class Row:
    """One line of the table.

    Attributes:
      name: unique.
      k: images of a record.
      ready: what it does, compiled.
      seconds: one for each round.
    """

    name: str
    k: int
    ready: timing.Ready | None
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        return _RECORDS.value * self.k / statistics.median(self.seconds)


def random_records(config: ExperimentConfig, count: int, seed: int) -> data.Records:
    """Returns records of random pixels, of the shape of the config's dataset."""
    blank, rng = data.blank(config.data), np.random.default_rng(seed)
    shape = (count, *blank.images.shape[1:])
    return dataclasses.replace(
        blank,
        images=rng.integers(256, size=shape, dtype=np.uint8),
        labels=rng.integers(blank.num_classes, size=count, dtype=np.int32),
    )


def rows_of(config: ExperimentConfig, name: str, records: data.Records) -> list[Row]:
    """Returns the rows of a method: a part of its update, and the model alone."""
    method = dataclasses.replace(config.method, name=METHODS[name])
    public = PublicConfig(name="bank", path="random") if method.num_public else None
    config = dataclasses.replace(config, method=method, public=public)
    model = Model(config, records)
    pipeline = Pipeline(
        config,
        model,
        records,
        mechanism=privacy.Mechanism(
            sampling_prob=1.0, num_updates=1, noise_multiplier=1.0
        ),
        seed=0,
        public=random_records(config, POOL, seed=1) if public else None,
    )
    batch = pipeline.accumulate.place(np.arange(_RECORDS.value))
    state, k = pipeline.state, method.set_size

    def update() -> Any:
        totals = training.init_totals(state.params, pipeline.mesh)
        return jax.block_until_ready(
            pipeline.accumulate(state.params, state.step, batch, totals)
        )

    shape = (_RECORDS.value * k, *records.image_shape)
    images = jnp.asarray(np.random.default_rng(2).standard_normal(shape, np.float32))
    params, frozen = pipeline.all_params(state.params), pipeline.accumulate.frozen
    is_head = bool(frozen) and model.is_head(state.params, frozen)
    forward = jax.jit(model.encode if is_head else model.logits)
    return [
        Row(f"{name}, K = {k}", k, timing.Ready(update)),
        Row(f"forward, {k} images", k, timing.Ready(call(forward, params, images))),
    ]


def call(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(function(*args))


def table13(config: ExperimentConfig) -> None:
    """Does what the flags say."""
    path = timing.output_file(_JSON.value)
    if _RECORDS.value % jax.device_count():
        raise UserError(
            f"--records is {_RECORDS.value}: it must be a multiple of the number of"
            f" devices, {jax.device_count()}"
        )
    result: dict[str, Any] = {"environment": timing.environment()}
    timing.tell_environment(result["environment"])
    records = random_records(config, _RECORDS.value, seed=0)
    result["workload"] = (
        f"{config.model.name}, {'x'.join(map(str, records.image_shape))},"
        f" {records.num_classes} classes, trainable {config.finetune.trainable},"
        f" {config.performance.precision}, {_RECORDS.value} records at a time,"
        f" {_ROUNDS.value} paired rounds: medians (least to greatest)"
    )
    print(result["workload"], flush=True)
    pairs = [rows_of(config, name, records) for name in METHODS]
    rows = [row for pair in pairs for row in pair]
    for row in rows:
        assert row.ready is not None
        row.ready.call()  # compiles
    timing.measure(rows, _ROUNDS.value)
    updates, batch = config.privacy.num_updates, config.privacy.expected_batch_size
    lines = []
    result["rows"] = []
    for step, forward in pairs:
        median = statistics.median(step.seconds)
        ratios = timing.paired(step, pairs[0][0]), timing.paired(step, forward)
        hours = updates * batch * median / _RECORDS.value / 3600
        found = {
            "name": step.name,
            "k": step.k,
            "ratio_to_self_aug": ratios[0],
            "ratio_to_forward": ratios[1],
            "images_per_second": step.images_per_second,
            "hours": hours,
            "seconds": step.seconds,
            "forward_seconds": forward.seconds,
        }
        result["rows"].append(found)
        lines.append(
            [
                step.name,
                *map(timing.ratio, ratios),
                f"{median:.3g}",
                f"{step.images_per_second:,.1f}",
                f"{hours:.3g}",
            ]
        )
    columns = ["", "x Self-Aug", "x forward alone", "seconds", "images/s"]
    print("\n" + timing.table([*columns, f"hours, {updates} updates"], lines))
    print(
        "\nThe paper's table, ViT-B-16 on Caltech256 on one A100, 245 updates: 2 h 12,"
        " 7 h 33 (3.43 x), 7 h 40 (3.48 x)"
    )
    timing.write(path, result)


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    try:
        if argv[1:]:
            raise UserError(f"{argv[1]} is not a flag: they begin with --")
        command_line.config_file()
        table13(from_config_dict(_CONFIG.value))
    except UserError as error:
        command_line.fail(error)


def parse(argv: list[str]) -> list[str]:
    return command_line.parse(argv, check=check_flags)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
