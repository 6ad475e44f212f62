"""Times one clipped gradient sum of WRN-16-w against its alternatives.

    python experiments/benchmark.py --width=2 --k=16 --records=4 --json=speed.json

The workload is B records of K random 32x32x3 images. Every round times every row once,
in rotated order, and ratios are taken within rounds, so that a machine that slows down
for a while spoils no comparison. Leave it alone all the same: PyTorch's CPU
threads spin while they wait for each other, and with another program on their cores its
rows were seen to take ten times as long, JAX's twice.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from absl import app, flags, logging
from jax.sharding import NamedSharding, PartitionSpec
from jax_privacy import clipping
from timing import Ready, environment, measure, number, paired, profile, ratio

from dpmix_jax import command_line, models, training
from dpmix_jax.errors import UserError
from dpmix_jax.ghost import ghost_clipped_gradient
from dpmix_jax.gradients import clipped_gradient
from dpmix_jax.performance import PRECISIONS, PerformanceConfig

FORMULATIONS = ("ours:rows", "ours:shifted", "ours:flat", "ours:batch_group")
ALL_DEVICES = "ours, all devices"
GHOST = "ours:ghost"
IN_JAX = ("non-private", "ours", GHOST, ALL_DEVICES, *FORMULATIONS, "jax_privacy")
IN_TORCH = (
    "torch non-private",
    "torch.func vmap(grad)",
    "Opacus hooks",
    "Opacus functorch",
    "Opacus ghost",
    "K-averaged hooks",
)
NUM_CLASSES = 10
L2_CLIP_NORM = 0.1  # below every gradient's norm here, so that the clip is at work
# Of the norm of a sum, between two ways to compute it.
TOLERANCE = {"float32": 1e-5, "tensorfloat32": 5e-3, "bfloat16": 5e-2}

_WIDTH = flags.DEFINE_integer("width", 2, "w of WRN-16-w.", lower_bound=1)
_K = flags.DEFINE_integer("k", 16, "Images of a record.", lower_bound=1)
_RECORDS = flags.DEFINE_integer("records", 4, "B.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timings of each row.", lower_bound=1)
_METHODS = flags.DEFINE_list(
    "methods", None, "Rows to time; the non-private ones they need are added."
)
_FORMULATIONS = flags.DEFINE_bool(
    "formulations", False, "Adds a row for each formulation of convolutions."
)
_PRECISION = flags.DEFINE_enum(
    "precision", "float32", PRECISIONS, "Of the forward and backward pass."
)
_PROFILE = flags.DEFINE_bool(
    "profile", False, "Names the five operations that take most of our time."
)
_JSON = flags.DEFINE_string("json", None, "Where to write all that was measured.")
_RATIO = flags.DEFINE_bool(
    "dpmix_over_self_aug",
    False,
    "Times ours at K = 34 (DP-Mix) over ours at K = 16 (Self-Aug), and nothing else.",
)
_PEAK = flags.DEFINE_float(
    "peak_tflops",
    None,
    "Of the GPU at this precision; adds model FLOP utilisation to the table.",
    lower_bound=1e-9,
)


@dataclasses.dataclass
class Row:
    """One line of the table, and what was measured for it.

    Attributes:
      name: unique.
      k: images of a record.
      build: compiles it.
      jax_base: name of the row of JAX's plain gradient of the same images.
      error: why it cannot run.
      seconds: one for each round.
    """

    name: str
    k: int
    build: Callable[[], Ready]
    jax_base: str
    ready: Ready | None = None
    output: Any = None
    first_call_seconds: float | None = None
    error: str | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def in_torch(self) -> bool:
        return self.name in IN_TORCH

    @property
    def own_base(self) -> str:
        return IN_TORCH[0] if self.in_torch else self.jax_base

    def start(self) -> None:
        """Compiles and calls once."""
        begin = time.perf_counter()
        self.ready = self.build()
        self.output = self.ready.call()
        self.first_call_seconds = time.perf_counter() - begin


# The rows.


def jax_gradients(loss_fn: Callable[..., jax.Array]) -> dict[str, Callable[..., Any]]:
    """Returns functions of (params, images [B, K, ...], labels [B, K, O])."""

    def nonprivate(params, images, labels):
        images, labels = (x.reshape(-1, *x.shape[2:]) for x in (images, labels))
        return jax.grad(loss_fn)(params, images, labels)

    def ours(formulation):
        function = clipped_gradient(
            loss_fn, l2_clip_norm=L2_CLIP_NORM, convolutions=formulation
        )
        return lambda *args: function(*args)[0]

    ghost = ghost_clipped_gradient(loss_fn, l2_clip_norm=L2_CLIP_NORM)
    peer = clipping.clipped_grad(
        loss_fn, l2_clip_norm=L2_CLIP_NORM, batch_argnums=(1, 2), keep_batch_dim=False
    )
    return {
        "non-private": nonprivate,
        "ours": ours("auto"),
        GHOST: lambda *args: ghost(*args)[0],
        ALL_DEVICES: over_devices(ours("auto")),
        **{name: ours(name.removeprefix("ours:")) for name in FORMULATIONS},
        "jax_privacy": peer,
    }


def over_devices(function: Callable[..., Any]) -> Callable[..., Any]:
    """Spreads the records over all devices, as training does."""
    total = training.sum_over_devices(
        lambda params, records: function(params, *records), training.make_mesh()
    )
    return lambda params, *records: total(params, records)


def on_all_devices(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Places parameters whole, and a part of the records, on every device."""
    mesh, (params, *records) = training.make_mesh(), args
    if _RECORDS.value % mesh.size:
        raise UserError(
            f"--records is {_RECORDS.value}: it must be a multiple of the number of"
            f" devices, {mesh.size}"
        )
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = NamedSharding(mesh, PartitionSpec("records"))
    return (jax.device_put(params, everywhere), *jax.device_put(records, spread))


def performance() -> PerformanceConfig:
    return PerformanceConfig(precision=_PRECISION.value)


def build_jax(function: Callable[..., Any], args: tuple[Any, ...]) -> Ready:
    with performance().matmul_precision():
        compiled = jax.jit(function).lower(*args).compile()
    memory = compiled.memory_analysis()
    peak_bytes = memory and (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
    )
    return Ready(
        lambda: jax.block_until_ready(compiled(*args)),
        peak_bytes,
        (compiled.cost_analysis() or {}).get("flops"),
    )


def build_torch(make: Callable[[], Callable[[], Any]]) -> Ready:
    return Ready(make())


def make_rows(names: list[str], k: int, suffix: str = "") -> list[Row]:
    """Builds the rows of one K on the same images, of random pixels and labels."""
    rng = np.random.default_rng(0)
    shape = (_RECORDS.value, k)
    images = rng.standard_normal((*shape, 32, 32, 3), np.float32)
    labels = np.eye(NUM_CLASSES, dtype=np.float32)[
        rng.integers(NUM_CLASSES, size=shape)
    ]
    model = models.create(
        "wrn", NUM_CLASSES, depth=16, width=_WIDTH.value, dtype=performance().dtype
    )

    def loss_fn(params, images, labels):
        logits = model.apply(params, images)
        return optax.softmax_cross_entropy(logits, labels).mean()

    params = jax.jit(model.init)(jax.random.key(0), images[0, :1])
    args = (params, jnp.asarray(images), jnp.asarray(labels))
    builds: dict[str, Callable[[], Ready]] = {
        name: functools.partial(build_jax, function, args)
        for name, function in jax_gradients(loss_fn).items()
    }
    builds[ALL_DEVICES] = lambda: build_jax(
        jax_gradients(loss_fn)[ALL_DEVICES], on_all_devices(args)
    )
    if any(name in IN_TORCH for name in names):
        import torch_wrn  # needs the extra `peers`

        peers = torch_wrn.Gradients(
            _WIDTH.value, images, labels, L2_CLIP_NORM, _PRECISION.value
        )
        for name, make in peers.methods().items():
            builds[name] = functools.partial(build_torch, make)
    base = "non-private" + suffix
    return [Row(name + suffix, k, builds[name], base) for name in names]


def select() -> list[str]:
    """Returns the names of the rows that the flags ask for, bases first.

    Raises:
      UserError: for a method that there is not.
    """
    known = (*IN_JAX, *IN_TORCH)
    if _METHODS.value is None:
        wanted = {name for name in known if name not in FORMULATIONS}
        if jax.device_count() == 1:
            wanted.discard(ALL_DEVICES)
        if _PRECISION.value != "float32":
            wanted.discard(GHOST)
    else:
        wanted = {name.strip() for name in _METHODS.value}
    for name in sorted(wanted - {*known}):
        raise UserError(f"--methods has {name!r}: it must be among {', '.join(known)}")
    if _FORMULATIONS.value:
        wanted.update(FORMULATIONS)
    wanted.add("non-private")
    missing = [p for p in ("torch", "opacus") if importlib.util.find_spec(p) is None]
    if wanted & {*IN_TORCH} and missing:
        print(
            f"without rows in PyTorch, for want of {' and '.join(missing)}:"
            ' pip install -e ".[peers]"'
        )
        wanted -= {*IN_TORCH}
    elif wanted & {*IN_TORCH}:
        wanted.add("torch non-private")
    return [name for name in known if name in wanted]


def rows_of_flags() -> list[Row]:
    """Returns the rows to time.

    Raises:
      UserError: for flags that contradict each other.
    """
    if not _RATIO.value:
        return make_rows(select(), _K.value)
    for name in ("k", "methods", "formulations"):
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} has no place beside --dpmix_over_self_aug")
    names = ["non-private", "ours"]
    return make_rows(names, 16, " K=16") + make_rows(names, 34, " K=34")


# Measuring.


def start(rows: list[Row]) -> None:
    """Calls every row for the first time; one of PyTorch's may fail."""
    for row in rows:
        try:
            row.start()
        except Exception as error:
            if not row.in_torch:
                raise
            row.ready = None
            row.error = " ".join(f"{type(error).__name__}: {error}".split())


def check(rows: list[Row]) -> dict[str, float]:
    """Compares our sums with those of jax_privacy, which are made if not asked for.

    Ends the program if they differ: the speed of a wrong sum is of no interest.
    """
    differences = {}
    for k in sorted({row.k for row in rows if row.name.startswith("ours")}):
        asked = [row for row in rows if row.k == k and row.name == "jax_privacy"]
        (peer,) = asked or make_rows(["jax_privacy"], k)
        if not asked:
            peer.start()
        for row in rows:
            if row.k != k or not row.name.startswith("ours"):
                continue
            difference = relative_difference(row.output, peer.output)
            differences[row.name] = difference
            allowed = TOLERANCE[_PRECISION.value]
            if not difference <= allowed:  # also where it is NaN
                sys.exit(
                    f"error: {row.name} differs from jax_privacy by {difference:.1e} of"
                    f" the norm of the sum, {allowed:g} is allowed: nothing was timed"
                )
    return differences


def relative_difference(found: Any, expected: Any) -> float:
    gap = optax.tree.norm(optax.tree.sub(found, expected))
    return float(gap / optax.tree.norm(expected))


def summarize(row: Row, rows: dict[str, Row]) -> dict[str, Any]:
    """Returns everything about a row, as JSON takes it."""
    median = statistics.median(row.seconds) if row.seconds else None
    model = rows[row.jax_base].ready
    return {
        "name": row.name,
        "k": row.k,
        "error": row.error,
        "ratio_to_jax_nonprivate": paired(row, rows[row.jax_base]),
        "ratio_to_own_nonprivate": paired(row, rows.get(row.own_base)),
        "median_seconds": median,
        "images_per_second": median and _RECORDS.value * row.k / median,
        "first_call_seconds": row.first_call_seconds,
        "peak_bytes": row.ready and row.ready.peak_bytes,
        "model_flop_utilisation": utilisation(median, model and model.flops),
        "seconds": row.seconds,
    }


def utilisation(seconds: float | None, flops: float | None) -> float | None:
    """Share of the GPU's peak that the FLOPs of the non-private step make up."""
    if jax.default_backend() != "gpu" or not (_PEAK.value and seconds and flops):
        return None
    return flops / seconds / (_PEAK.value * 1e12)


# What is printed.


def table(summaries: list[dict[str, Any]]) -> str:
    """Returns the Markdown table, ratios first."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "": lambda s: s["name"],
        "x JAX non-private": lambda s: ratio(s["ratio_to_jax_nonprivate"]),
        "x own non-private": lambda s: ratio(s["ratio_to_own_nonprivate"]),
        "seconds": lambda s: number(s["median_seconds"], ".3g"),
        "images/s": lambda s: number(s["images_per_second"], ",.0f"),
        "first call, s": lambda s: number(s["first_call_seconds"], ".1f"),
        "memory, MiB": lambda s: number(
            s["peak_bytes"] and s["peak_bytes"] / 2**20, ",.0f"
        ),
    }
    if any(s["model_flop_utilisation"] for s in summaries):
        columns["model FLOP utilisation"] = lambda s: number(
            s["model_flop_utilisation"], ".1%"
        )
    lines = []
    for summary in summaries:
        if summary["error"]:
            reason = summary["error"].replace("|", "\\|")
            empty = ["-"] * (len(columns) - 2)
            lines.append([summary["name"], f"cannot run: {reason}", *empty])
        else:
            lines.append([cell(summary) for cell in columns.values()])
    return timing.table(list(columns), lines)


def benchmark() -> None:
    """Does what the flags say."""
    path = timing.output_file(_JSON.value)
    rows = rows_of_flags()
    with_torch = any(row.in_torch for row in rows)
    result: dict[str, Any] = {"environment": environment(with_torch)}
    timing.tell_environment(result["environment"])
    ks = " and ".join(str(k) for k in sorted({row.k for row in rows}))
    result["workload"] = (
        f"WRN-16-{_WIDTH.value}, 32x32x3, {_PRECISION.value}, {_RECORDS.value} records"
        f" x {ks}"
        f" images, {_ROUNDS.value} paired rounds: medians (least to greatest)"
    )
    print(result["workload"], flush=True)
    start(rows)
    result["difference_from_jax_privacy"] = check(rows)
    measure(rows, _ROUNDS.value)
    by_name = {row.name: row for row in rows}
    result["rows"] = [summarize(row, by_name) for row in rows]
    print("\n" + table(result["rows"]))
    if _RATIO.value:
        found = paired(by_name["ours K=34"], by_name["ours K=16"])
        result["dpmix_over_self_aug"] = found
        print(f"\nours at K = 34 over ours at K = 16: {ratio(found)}; 34/16 = 2.125")
    if _PROFILE.value and "ours" in by_name:
        result["profile"] = profile(by_name["ours"])
        whole = sum(seconds for _, seconds in result["profile"])
        for name, seconds in result["profile"][:5]:
            print(f"{seconds / whole:6.1%} {seconds:.3g} s  {name}")
    timing.write(path, result)


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    try:
        if argv[1:]:
            raise UserError(f"{argv[1]} is not a flag: they begin with --")
        benchmark()
    except UserError as error:
        command_line.fail(error)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
