"""Times one clipped gradient sum of a model against its alternatives.

    python experiments/benchmark.py --width=2 --k=16 --records=4 --json=speed.json
    python experiments/benchmark.py --methods=ours --k=16 --k=34  # Self-Aug and DP-Mix
    python experiments/benchmark.py --head=3969 --k=2 --records=8192 --rounds=3
    python experiments/benchmark.py --cnn --k=1 --records=256

The workload is WRN-d-w on B records of K random 32x32x3 images, the CNN of
configs/fashion_mnist.py on 28x28x1 images, or a linear head on embeddings. Leave the
machine alone meanwhile: PyTorch's CPU threads spin while they wait for each other, and
with another program on their cores its rows were seen to take ten times as long, JAX's
twice.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from jax_privacy import clipping

from dpmix_jax import conv, devices, models, tuning
from dpmix_jax.errors import UserError
from dpmix_jax.ghost import always, ghost_clipped_gradient
from dpmix_jax.gradients import clipped_gradient
from dpmix_jax.run import cli
from dpmix_jax.run.performance import PRECISIONS, PerformanceConfig

BASE, PEER, TORCH_BASE = "non-private", "jax_privacy", "torch non-private"
ONE_BY_ONE = "jax_privacy, one record at a time"
GHOST, ALL_DEVICES = "ours:ghost", "ours on all devices"
HEAD = "ours:head"
MEASURED = "ours:measured"
FORMULATIONS = (
    *(f"ours:{name}" for name in conv.FORMULATIONS if name != "auto"),
    MEASURED,
)
IN_JAX = (BASE, "ours", GHOST, HEAD, ALL_DEVICES, *FORMULATIONS, PEER)
IN_TORCH = (
    TORCH_BASE,
    "torch.func vmap(grad)",
    "Opacus hooks",
    "Opacus functorch",
    "Opacus ghost",
    "K-averaged hooks",
)
NUM_CLASSES = 10
L2_CLIP_NORM = 0.1  # below every gradient's norm here, so that the clip is at work
# Of the norm of a sum, between two ways to compute it.
TOLERANCE = {"float32": 3e-5, "tensorfloat32": 5e-3, "bfloat16": 5e-2}
MOST = 1e-2  # where rounding turns a ReLU

_DEPTH = flags.DEFINE_integer("depth", 16, "d of WRN-d-w.")
_WIDTH = flags.DEFINE_integer("width", 2, "w of WRN-d-w.", lower_bound=1)
_HEAD = flags.DEFINE_integer(
    "head", None, "E: times a linear head over embeddings instead.", lower_bound=1
)
_CNN = flags.DEFINE_bool("cnn", False, "Times the small CNN instead.")
_K = flags.DEFINE_multi_integer(
    "k", [16], "Images of a record; given twice, the two are compared.", lower_bound=1
)
_RECORDS = flags.DEFINE_integer("records", 4, "B.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timings of each row.", lower_bound=1)
_METHODS = flags.DEFINE_list(
    "methods", None, "Rows to time; those they are compared with are added."
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
_PEAK = flags.DEFINE_float(
    "peak_tflops",
    None,
    "Of the GPU at this precision; adds model FLOP utilisation to the table.",
    lower_bound=1e-9,
)
_JSON = flags.DEFINE_string("json", None, "Where to write all that was measured.")
cli.define_dry_run()

COLUMNS: timing.Columns = {
    "": ("name", str),
    "K": ("k", str),
    "x JAX non-private": ("ratio_to_jax_nonprivate", timing.ratio),
    "x own non-private": ("ratio_to_own_nonprivate", timing.ratio),
    "seconds": ("median_seconds", "{:.3g}".format),
    "images/s": ("images_per_second", "{:,.0f}".format),
    "first call, s": ("first_call_seconds", "{:.1f}".format),
    "memory, MiB": ("peak_bytes", lambda size: f"{size / 2**20:,.0f}"),
    "model FLOP utilisation": ("model_flop_utilisation", "{:.1%}".format),
}


@dataclasses.dataclass(kw_only=True)
class Row(timing.Row):
    """A row that was called once.

    Attributes:
      output: of that call.
      first_call_seconds: of compilation and that call.
      peak_bytes: arguments, outputs and temporaries, where the compiler tells.
      flops: of a call, where the compiler tells.
      difference: of the output from jax_privacy's, over the norm of that; of
        jax_privacy's from `otherwise`.
      otherwise: returns a row of the same output but for rounding.
      error: why it cannot run.
    """

    output: Any = None
    first_call_seconds: float | None = None
    peak_bytes: int | None = None
    flops: float | None = None
    difference: float | None = None
    otherwise: Any = None
    error: str | None = None


# What is timed.


def jax_gradients(
    loss_fn: Callable[..., jax.Array], measured: Callable[..., conv.Formulation]
) -> dict[str, Callable[..., Any]]:
    """Returns functions of (params, images [B, K, ...], labels [B, K, O]).

    Args:
      loss_fn: of a record.
      measured: `f(make)` returns the fastest formulations of `make(formulation)`.
    """

    def nonprivate(params, images, labels):
        images, labels = (x.reshape(-1, *x.shape[2:]) for x in (images, labels))
        return jax.grad(loss_fn)(params, images, labels)

    def ours(transform, **options):
        function = transform(loss_fn, l2_clip_norm=L2_CLIP_NORM, **options)
        return lambda *args: function(*args)[0]

    def by(formulation: conv.Formulation):
        return ours(clipped_gradient, convolutions=formulation)

    default, mesh = ours(clipped_gradient), devices.make_mesh()
    of_all_devices = devices.sum_over_devices(
        lambda params, step, records, inputs: default(params, *records), mesh
    )
    peer = functools.partial(
        clipping.clipped_grad,
        loss_fn,
        l2_clip_norm=L2_CLIP_NORM,
        batch_argnums=(1, 2),
        keep_batch_dim=False,
    )
    return {
        BASE: nonprivate,
        "ours": default,
        GHOST: ours(ghost_clipped_gradient),
        HEAD: ours(ghost_clipped_gradient, keep=always),
        ALL_DEVICES: lambda params, *records: of_all_devices(
            params, jnp.int32(0), records, ()
        ),
        **{
            name: by(measured(by) if name == MEASURED else name.removeprefix("ours:"))
            for name in FORMULATIONS
        },
        PEER: peer(),
        ONE_BY_ONE: peer(microbatch_size=1),
    }


def on_all_devices(params: Any, *records: jax.Array) -> tuple[Any, ...]:
    """Places parameters whole, and a part of the records, on every device."""
    mesh = devices.make_mesh()
    spread = NamedSharding(mesh, PartitionSpec("records"))
    return (devices.put_everywhere(params, mesh), *jax.device_put(records, spread))


def jax_row(name: str, k: int, function: Callable[..., Any], args: Any) -> Row:
    """Compiles a function and calls it once."""
    begin = time.perf_counter()
    with jax.default_matmul_precision(performance().matmul_precision):
        compiled = jax.jit(function).lower(*args).compile()
    row = Row(name=name, k=k, call=lambda: jax.block_until_ready(compiled(*args)))
    row.output = row.call and row.call()
    row.first_call_seconds = time.perf_counter() - begin
    row.flops = (compiled.cost_analysis() or {}).get("flops")
    if memory := compiled.memory_analysis():
        row.peak_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        row.peak_bytes += memory.output_size_in_bytes
    return row


def torch_row(name: str, k: int, make: Callable[[], Callable[[], Any]]) -> Row:
    """Calls a row of PyTorch once; some cannot run everywhere."""
    row, begin = Row(name=name, k=k, call=None), time.perf_counter()
    try:
        row.call = make()
        row.call()
        row.first_call_seconds = time.perf_counter() - begin
    except Exception as error:
        row.call, row.error = None, f"{type(error).__name__}: {error}"
    return row


def performance() -> PerformanceConfig:
    return PerformanceConfig(precision=_PRECISION.value)


def workload() -> tuple[tuple[int, ...], str, Callable[..., nn.Module]]:
    """Returns the shape of an image, the name of the model, and what makes it."""
    create = functools.partial(models.create, num_classes=NUM_CLASSES)
    if _HEAD.value:
        head = functools.partial(nn.Dense, NUM_CLASSES)
        return (_HEAD.value,), f"linear head, {_HEAD.value} x {NUM_CLASSES}", head
    if _CNN.value:
        options = {"features": (16, 32), "strided": True}
        cnn = functools.partial(create, "cnn", **options)
        return (28, 28, 1), "CNN of 16 and 32 channels, 28x28x1", cnn
    name = f"WRN-{_DEPTH.value}-{_WIDTH.value}, 32x32x3"
    return (32, 32, 3), name, functools.partial(create, "wrn", **wrn_options())


def wrn_options() -> dict[str, Any]:
    return {"depth": _DEPTH.value, "width": _WIDTH.value}


def make_rows(names: Sequence[str], k: int) -> list[Row]:
    """Builds rows on the same random images and labels, and calls each once.

    Raises:
      UserError: for a depth that there is not.
    """
    rng, shape = np.random.default_rng(0), (_RECORDS.value, k)
    each, _, make_model = workload()
    images = rng.standard_normal((*shape, *each), np.float32)
    classes = rng.integers(NUM_CLASSES, size=shape)
    labels = np.eye(NUM_CLASSES, dtype=np.float32)[classes]
    try:
        model = make_model(dtype=performance().dtype)
        params = jax.jit(model.init)(jax.random.key(0), images[0, :1])
    except ValueError as error:
        raise UserError(f"--{error}") from None

    def loss_fn(params, images, labels):
        logits = model.apply(params, images)
        return optax.softmax_cross_entropy(logits, labels).mean()

    args, rows = (params, jnp.asarray(images), jnp.asarray(labels)), []

    def measured(make):
        if MEASURED not in names:
            return "auto"
        with jax.default_matmul_precision(performance().matmul_precision):
            return tuning.chooser(tuning.measure(tuning.find(make, args)))

    functions = jax_gradients(loss_fn, measured)
    for name, function in functions.items():
        placed = on_all_devices(*args) if name == ALL_DEVICES else args
        if name in names:
            rows.append(jax_row(name, k, function, placed))
    for row in (row for row in rows if row.name == PEER):
        row.otherwise = lambda: jax_row(ONE_BY_ONE, k, functions[ONE_BY_ONE], args)
    if not {*IN_TORCH}.isdisjoint(names):
        try:
            import torch_wrn
        except ImportError as error:
            print(f'without rows in PyTorch ({error}): pip install -e ".[peers]"')
            return rows
        peers = torch_wrn.Gradients(
            wrn_options(), images, labels, L2_CLIP_NORM, _PRECISION.value
        )
        for name, make in peers.methods().items():
            if name in names:
                rows.append(torch_row(name, k, make))
    return rows


def select() -> list[str]:
    """Returns the names of the rows to time, with those they are compared with.

    Raises:
      UserError: for a method that there is not, or records that cannot be spread.
    """
    in_torch = not _HEAD.value and not _CNN.value
    known = (*IN_JAX, *IN_TORCH) if in_torch else IN_JAX
    if _METHODS.value is None:
        wanted = {*known} - {*FORMULATIONS}
        if jax.device_count() == 1:
            wanted.discard(ALL_DEVICES)
        if _PRECISION.value != "float32":
            wanted -= {GHOST, HEAD}
        if not _HEAD.value:
            wanted.discard(HEAD)
    else:
        wanted = {name.strip() for name in _METHODS.value}
    for name in sorted(wanted - {*known}):
        raise UserError(f"--methods has {name!r}: it must be among {', '.join(known)}")
    if ALL_DEVICES in wanted:
        timing.check_records(_RECORDS.value)
    wanted |= {BASE, PEER, *(FORMULATIONS if _FORMULATIONS.value else ())}
    if not wanted.isdisjoint(IN_TORCH):
        wanted.add(TORCH_BASE)
    return [name for name in known if name in wanted]


# What comes out.


def check(rows: Sequence[Row]) -> None:
    """Compares our sums with jax_privacy's.

    Ends the program if they differ: the speed of a wrong sum is of no interest. Now and
    then rounding turns a ReLU, and a record's gradient with it. So where a sum differs
    by more than `TOLERANCE`, it may differ by as much as jax_privacy's own sum changes
    when it takes one record at a time, and by `MOST` at most.
    """

    def flat(row: Row) -> np.ndarray:
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(row.output)])

    def difference(row: Row) -> float:
        gap = np.linalg.norm(flat(row) - expected)
        return float(gap / np.linalg.norm(expected))

    @functools.cache
    def allowed() -> float:
        peer.difference = difference(peer.otherwise())
        print(f"{ONE_BY_ONE}: differs from {PEER} by {peer.difference:.1e}", flush=True)
        return max(usual, min(peer.difference, MOST))

    (peer,) = (row for row in rows if row.name == PEER)
    expected, usual = flat(peer), TOLERANCE[_PRECISION.value]
    for row in (row for row in rows if row.name.startswith("ours")):
        row.difference = difference(row)
        # Not "greater", which NaN never is.
        if not row.difference <= usual and not row.difference <= allowed():
            sys.exit(
                f"error: {row.name} differs from jax_privacy by {row.difference:.1e} of"
                f" the norm of the sum, {allowed():.2g} is allowed: nothing was timed"
            )


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns everything about the rows of one K, as JSON takes it."""
    named = {row.name: row for row in rows}
    flops = named[BASE].flops if jax.default_backend() == "gpu" else None
    result = []
    for row in rows:
        own_base = named[TORCH_BASE if row.name in IN_TORCH else BASE]
        images = row.median and _RECORDS.value * row.k / row.median
        # The share of the GPU's peak that the FLOPs of the non-private step make up.
        share = (
            row.median and flops and _PEAK.value and flops / row.median / _PEAK.value
        )
        result.append(
            {
                "name": row.name,
                "k": row.k,
                "error": row.error,
                "difference_from_jax_privacy": row.difference,
                "ratio_to_jax_nonprivate": row.over(named[BASE]),
                "ratio_to_own_nonprivate": row.over(own_base),
                "median_seconds": row.median,
                "images_per_second": images,
                "first_call_seconds": row.first_call_seconds,
                "peak_bytes": row.peak_bytes,
                "model_flop_utilisation": share and share / 1e12,
                "seconds": row.seconds,
            }
        )
    return result


def benchmark() -> dict[str, Any]:
    """Does what the flags say, and returns all that was measured."""
    names, ks = select(), sorted({*_K.value})
    if cli.would(
        f"time {', '.join(names)}, K = {' and '.join(map(str, ks))}, {_ROUNDS.value}"
        f" rounds{timing.written(_JSON.value)}"
    ):
        return {}
    result: dict[str, Any] = {
        "environment": timing.environment(),
        "workload": f"{workload()[1]}, {_PRECISION.value}, {_RECORDS.value} records x"
        f" {' and '.join(map(str, ks))} images,"
        f" {_ROUNDS.value} paired rounds: medians (least to greatest)",
    }
    print(result["workload"], flush=True)
    groups = [make_rows(names, k) for k in ks]
    for rows in groups:
        check(rows)
    timing.measure([row for rows in groups for row in rows], _ROUNDS.value)
    result["rows"] = [line for rows in groups for line in summarize(rows)]
    print("\n" + timing.table(COLUMNS, result["rows"]))
    for row in result["rows"]:
        if row["error"]:
            print(f"{row['name']} cannot run: {' '.join(row['error'].split())}")
    ours = [row for rows in groups for row in rows if row.name == "ours"]
    result["ratios_to_least_k"] = [row.over(ours[0]) for row in ours[1:]]
    for row, found in zip(ours[1:], result["ratios_to_least_k"], strict=True):
        images = f"for {row.k / ours[0].k:.4g} times the images"
        print(f"ours, K = {row.k} over {ours[0].k}: {timing.ratio(found)} {images}")
    if _PROFILE.value and ours and ours[0].call:
        result["profile"] = timing.profile(ours[0].call)
        whole = sum(seconds for _, seconds in result["profile"])
        for name, seconds in result["profile"][:5]:
            print(f"{seconds / whole:6.1%} {seconds:.3g} s  {name}")
    return result


if __name__ == "__main__":
    cli.start(lambda: timing.run(_JSON.value, benchmark))
