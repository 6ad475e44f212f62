"""Which formulation of each convolution is the fastest here, found by timing them.

`conv.fast_convolutions` chooses by a table of shapes and platforms. What is measured is
surer, as when cuDNN times its algorithms before the first use:

    gradients = functools.partial(dpm.clipped_gradient, loss_fn, l2_clip_norm=1.0)
    found = tuning.find(lambda f: gradients(convolutions=f), (params, images, labels))
    choices = tuning.measure(found)
    gradient_fn = gradients(convolutions=tuning.chooser(choices))

Formulations round differently, and two timings may choose differently. So a run that
is to be repeated bit for bit keeps its choices, which are a dict of strings.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from dpmix_jax import conv

_SECONDS = 0.05  # for the timing of a formulation, after the call that compiles it
# XLA computes `batch_group` ten times slower than the others on CPUs.
_CANDIDATES = {"cpu": ("rows", "shifted", "plain")}


def key(found: conv.Batched) -> str:
    """Returns what a choice depends on, the same in each process and version.

    Example:
      `4 records of float32[2,9,9,3] and float32[2,9,9,8]: batch_group_count=1 ...`
    """
    one, other = (
        f"{x.dtype.name}[{','.join(map(str, x.shape[1:]))}]"
        for x in (found.lhs, found.rhs)
    )
    settings = " ".join(
        f"{name}={tuple(value) if isinstance(value, tuple) else value}".replace(" ", "")
        for name, value in sorted(found.conv.items())
        if value is not None
    )
    return f"{found.lhs.shape[0]} records of {one} and {other}: {settings}"


def chooser(choices: Mapping[str, str]) -> Callable[[conv.Batched], str]:
    """Returns a formulation for `conv.fast_convolutions` from names by `key`.

    A convolution whose key is missing is computed by `auto`.
    """
    return lambda found: choices.get(key(found), "auto")


def find(
    make: Callable[[conv.Formulation], Callable[..., Any]], args: Sequence[Any]
) -> dict[str, conv.Batched]:
    """Lists the convolutions of a program for which there is a choice, by `key`.

    Args:
      make: returns the program for a formulation, `f(*args)`. It is traced, and nothing
        is computed.
      args: arrays, or their shapes and types.
    """
    found: dict[str, conv.Batched] = {}

    def record(batched: conv.Batched) -> str:
        if len(applicable(batched)) > 1:
            found[key(batched)] = batched
        return "auto"

    jax.eval_shape(make(record), *args)
    return found


def applicable(found: conv.Batched) -> tuple[str, ...]:
    """Returns the formulations to be timed, first the one that `auto` comes to."""
    platform = timed_on()
    names = ("auto", *_CANDIDATES.get(platform, conv.FORMULATIONS[1:]))
    shape, on_cpu = found.out.shape, platform == "cpu"
    each = (conv.choose(found.conv, shape, name, on_cpu) for name in names)
    return tuple(dict.fromkeys(each))


def timed_on() -> str:
    """Returns the platform of the device that `seconds_of` times, the first one."""
    return jax.devices()[0].platform


def seconds_of(found: conv.Batched, name: str) -> float:
    """Times a formulation on the first device; returns the median of a few calls.

    Operands are drawn from a normal distribution, by a constant key.
    """
    function = jax.jit(functools.partial(conv.batched, found.conv, name))
    operands = [
        jax.device_put(
            jax.random.normal(jax.random.key(i), x.shape, x.dtype), jax.devices()[0]
        )
        for i, x in enumerate((found.lhs, found.rhs))
    ]
    jax.block_until_ready(function(*operands))
    seconds: list[float] = []
    until = time.perf_counter() + _SECONDS
    while not seconds or time.perf_counter() < until:
        begin = time.perf_counter()
        jax.block_until_ready(function(*operands))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def measure(found: Mapping[str, conv.Batched]) -> dict[str, str]:
    """Times the formulations of each convolution, and returns the fastest by `key`.

    Formal guarantees:
      - A choice depends on shapes, types and time alone, on no record: what is timed
        has random operands.

    A formulation that fails, as out of memory, is not chosen; where all do, or two take
    the same time, the choice is that of `auto`.

    Args:
      found: from `find`.
    """
    return {name: _fastest(batched) for name, batched in found.items()}


def _fastest(found: conv.Batched) -> str:
    names, seconds = applicable(found), {}
    for name in names:
        try:
            seconds[name] = seconds_of(found, name)
        except Exception:  # whatever it is, this formulation does not run here
            continue
    return min(seconds, key=seconds.__getitem__, default=names[0])
