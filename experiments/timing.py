"""What the two benchmarks share: rows timed in rounds, and what is printed of them.

Every round times every row once, in rotated order, and ratios are taken within rounds,
so that a machine that slows down for a while spoils no comparison.
"""

import collections
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from dpmix_jax.errors import require
from dpmix_jax.files import write_atomically

Columns = dict[str, tuple[str, Callable[[Any], str]]]
PACKAGES = ("jax", "jaxlib", "jax_privacy", "flax", "torch", "opacus")


@dataclasses.dataclass(kw_only=True)
class Row:
    """One line of a table.

    Attributes:
      name: of what is timed.
      k: images of a record.
      call: does the work and returns its result when it is done; None if it cannot.
      seconds: of `call`, one for each round.
    """

    name: str
    k: int
    call: Callable[[], Any] | None
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def over(self, base: "Row | None") -> dict[str, float] | None:
        """Returns median, least and greatest ratio of seconds within rounds."""
        if base is None or not self.seconds or not base.seconds:
            return None
        ratios = [a / b for a, b in zip(self.seconds, base.seconds, strict=True)]
        middle = statistics.median(ratios)
        return {"median": middle, "min": min(ratios), "max": max(ratios)}


def check_records(count: int) -> None:
    """Raises `UserError` for `--records` that cannot be spread over all devices."""
    devices = jax.device_count()
    allowed = f"a multiple of the number of devices, {devices}"
    require(count % devices == 0, "--records", count, allowed)


def measure(rows: Sequence[Row], rounds: int) -> None:
    """Times the rows that can run."""
    able = [(row, row.call) for row in rows if row.call is not None]
    for turn in range(rounds):
        offset = turn % len(able)
        for row, call in able[offset:] + able[:offset]:
            begin = time.perf_counter()
            call()
            row.seconds.append(time.perf_counter() - begin)


def profile(call: Callable[[], Any]) -> list[tuple[str, float]]:
    """Returns the operations of a call and their seconds, longest first."""
    calls = 3
    spent: dict[str, float] = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                call()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        trace = jax.profiler.ProfileData.from_file(str(path))
        for plane in trace.planes:
            for line in plane.lines:
                for event in line.events:
                    if "hlo_op" in dict(event.stats):
                        spent[event.name] += event.duration_ns / 1e9 / calls
    return sorted(spent.items(), key=lambda item: -item[1])


def environment() -> dict[str, Any]:
    """Prints and returns hardware and versions."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["XLA_FLAGS"] = os.environ.get("XLA_FLAGS") or "none"
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    return found


def _processor() -> str:
    """Returns the name of the CPU; `platform.processor` is empty on most Linuxes."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def ratio(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def table(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table; a None is a dash, a column of them is left out.

    Args:
      columns: by title, the key of a row and what shows its value.
      rows: one for each line.
    """
    shown = {
        title: ["-" if row[key] is None else show(row[key]) for row in rows]
        for title, (key, show) in columns.items()
        if any(row[key] is not None for row in rows)
    }
    lines = [list(shown), ["---"] * len(shown), *zip(*shown.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(json_file: str | None) -> str:
    """Says for --dry_run where `run` writes to."""
    return f", and write {json_file}" if json_file else ""


def run(json_file: str | None, benchmark: Callable[[], dict[str, Any]]) -> None:
    """Runs a benchmark, and writes what it returns to a file, if one is named.

    Args:
      json_file: the file.
      benchmark: returns an empty dictionary under --dry_run.

    Raises:
      UserError: for a file that cannot be written, before anything is timed.
    """
    path = pathlib.Path(json_file) if json_file else None
    fits = path is None or (path.parent.is_dir() and not path.is_dir())
    require(fits, "--json", json_file, "a file in a folder that exists")
    result = benchmark()
    if path and result:
        write_atomically(path, json.dumps(result, indent=2) + "\n")
