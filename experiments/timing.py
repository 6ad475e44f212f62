"""What benchmarks share: rounds in which every row is timed once, and what they print.

Ratios are taken within rounds, so that a machine that slows down for a while spoils no
comparison.
"""

import collections
import glob
import gzip
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from dpmix_jax.errors import UserError
from dpmix_jax.files import write_atomically

PACKAGES = ("jax", "jaxlib", "jax_privacy", "flax", "torch", "opacus")


class Ready(NamedTuple):
    """A compiled row.

    Attributes:
      call: does the work and returns the sum when it is done.
      peak_bytes: arguments, outputs and temporaries, where the compiler tells.
      flops: of one call, where the compiler tells.
    """

    call: Callable[[], Any]
    peak_bytes: int | None = None
    flops: float | None = None


class Timed(Protocol):
    """A row of a benchmark: what it does, and its seconds, one for each round."""

    name: str
    ready: Ready | None
    seconds: list[float]


def measure(rows: Sequence[Timed], rounds: int) -> None:
    """Times the rows that have started, in rounds, in rotated order."""
    able = [row for row in rows if row.ready]
    for turn in range(rounds):
        offset = turn % len(able)
        for row in able[offset:] + able[:offset]:
            assert row.ready is not None
            begin = time.perf_counter()
            row.ready.call()
            row.seconds.append(time.perf_counter() - begin)


def profile(row: Timed, calls: int = 3) -> list[tuple[str, float]]:
    """Returns the operations of a row and their seconds in one call, longest first."""
    assert row.ready is not None
    spent: dict[str, float] = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                row.ready.call()
        (path,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            spent[event["name"]] += event["dur"] / 1e6 / calls
    return sorted(spent.items(), key=lambda item: -item[1])


def paired(row: Timed, base: Timed | None) -> dict[str, float] | None:
    """Returns median, least and greatest ratio of two rows within rounds."""
    if base is None or not row.seconds or not base.seconds:
        return None
    ratios = [a / b for a, b in zip(row.seconds, base.seconds, strict=True)]
    middle = statistics.median(ratios)
    return {"median": middle, "min": min(ratios), "max": max(ratios)}


def environment(with_torch: bool = False) -> dict[str, Any]:
    """Returns hardware and versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        if with_torch or package not in ("torch", "opacus"):
            versions[package] = importlib.metadata.version(package)
    found = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "jax_device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions,
    }
    if with_torch:
        import torch

        cuda = torch.cuda.is_available()
        found["torch_device"] = torch.cuda.get_device_name() if cuda else "cpu"
        found["torch_threads"] = torch.get_num_threads()
    return found


def processor() -> str:
    """Returns the name of the CPU; `platform.processor` is empty on most Linuxes."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def ratio(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def output_file(name: str | None) -> pathlib.Path | None:
    """Returns where `--json` says; a mistake is told before anything is timed."""
    path = pathlib.Path(name) if name else None
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"--json is {path}: it must be a file in a folder that exists")
    return path


def tell_environment(found: dict[str, Any]) -> None:
    """Prints what `environment` has found."""
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(" ".join(item) for item in value.items())
        print(f"{name.replace('_', ' ')}: {value}")


def write(path: pathlib.Path | None, result: dict[str, Any]) -> None:
    """Writes all that was measured, if that was asked for."""
    if path:
        write_atomically(path, json.dumps(result, indent=2) + "\n")
