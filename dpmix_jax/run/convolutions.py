"""The choice of formulations that a run measures, keeps, and goes on with."""

import contextlib
import dataclasses
import json
import pathlib
import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

from dpmix_jax import conv, tuning
from dpmix_jax.errors import UserError
from dpmix_jax.files import cache_folder, locked, write_atomically
from dpmix_jax.progress import say
from dpmix_jax.run.build import Parts
from dpmix_jax.run.performance import PerformanceConfig
from dpmix_jax.run.workdir import Workdir


def measured(
    parts: Parts,
    config: PerformanceConfig,
    microbatch_size: int,
    workdir: Workdir,
    *,
    goes_on: bool,
) -> Parts:
    """Returns parts whose convolutions are computed as was found to be fastest.

    What was chosen is kept in `convolutions.json` of the workdir, and for other runs in
    the cache, by device and version of JAX. A run that goes on takes its own choice on
    whatever machine it is, so that its sums are rounded alike; a convolution that it
    lacks, of another microbatch size, is computed by `auto`.

    Args:
      parts: of the run.
      config: of the run.
      microbatch_size: m.
      workdir: of the run.
      goes_on: whether updates have been made.

    Raises:
      UserError: if the choice of a run that goes on is missing or damaged.
    """
    kept = workdir.read_json("convolutions.json")
    if kept is None:
        if goes_on:
            raise UserError(
                f"workdir {workdir.path} has no convolutions.json, which a run with"
                " performance.convolutions 'measured' goes on from: give what it began"
                " with, or use another --workdir"
            )
        found = tuning.find(parts.accumulate_by, parts.arguments(microbatch_size))
        choices = _choices(found)
        # An automatic size was found with other choices.
        if config.microbatch_size == "auto" and (
            _with(parts, choices).bytes_needed(microbatch_size)
            > config.budget(parts.mesh.size)
        ):
            say("convolutions: the fastest need more memory than there is: now auto")
            choices = {}
        kept = _content(choices)
        workdir.write_json("convolutions.json", kept)
    if not _is_valid(kept):
        path = workdir.path / "convolutions.json"
        raise UserError(f"{path} is damaged: use another --workdir")
    if kept["device"] != _device():
        say(
            f"convolutions: as chosen on {kept['device']}, where the run began; this is"
            f" {_device()}"
        )
    return _with(parts, kept["choices"])


def _choices(found: Mapping[str, conv.Batched]) -> dict[str, str]:
    """Returns the choice for each convolution, and measures those not in the cache."""
    begin, known = time.monotonic(), _cached()
    new = {key: batched for key, batched in found.items() if key not in known}
    measured = tuning.measure(new)
    if measured:
        _cache(measured)
    choices = {key: {**known, **measured}[key] for key in found}
    counts = Counter(choices.values()).most_common()
    say(
        f"convolutions: {len(new)} of {len(found)} shapes measured in"
        f" {time.monotonic() - begin:.2g} s"
        + "".join(f", {name} {count}" for name, count in counts)
    )
    return choices


def _with(parts: Parts, choices: Mapping[str, str]) -> Parts:
    accumulate = parts.accumulate_by(tuning.chooser(choices))
    return dataclasses.replace(parts, accumulate=accumulate)


# What is on disk.


def _device() -> str:
    return jax.devices()[0].device_kind


def _content(choices: Mapping[str, str]) -> dict[str, Any]:
    return {"device": _device(), "jax": jax.__version__, "choices": dict(choices)}


def _is_valid(content: Any) -> bool:
    choices = content.get("choices") if isinstance(content, dict) else None
    return (
        isinstance(choices, dict)
        and isinstance(content.get("device"), str)
        and all(name in conv.FORMULATIONS for name in choices.values())
    )


def _cache_file() -> pathlib.Path:
    name = re.sub(r"[^\w.]+", "-", f"{_device()}-jax{jax.__version__}")
    return cache_folder() / "convolutions" / f"{name}.json"


def _cached() -> dict[str, str]:
    """Returns the choices of other runs; what cannot be read is measured again."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(_cache_file().read_text())
        if _is_valid(content):
            return content["choices"]
    return {}


def _cache(measured: Mapping[str, str]) -> None:
    """Adds choices to those of other runs."""
    path = _cache_file()
    # A home that cannot be written costs the next run seconds, not this run.
    with (
        contextlib.suppress(OSError, UserError),
        locked(path.parent, "the cache", wait=True),
    ):
        content = _content({**_cached(), **measured})
        write_atomically(path, json.dumps(content, indent=2) + "\n")
