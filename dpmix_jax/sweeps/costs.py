"""What a sweep would cost on this device, and what it lacks, before anything starts."""

import contextlib
import pathlib
from collections.abc import Iterator

from dpmix_jax.data import DataConfig, datasets
from dpmix_jax.data.public import RENDERED, PublicConfig, named_public
from dpmix_jax.errors import UserError
from dpmix_jax.progress import say
from dpmix_jax.run.config import ExperimentConfig, to_dict
from dpmix_jax.run.dry_run import seconds_an_update
from dpmix_jax.sweeps import tables
from dpmix_jax.sweeps.grid import SweepConfig


def sheet(sweep: SweepConfig) -> str:
    """Returns a table of updates, images and hours by cell, and what is missing.

    Hours are of updates alone, from a few microbatches of blank images: evaluations,
    and embeddings that are kept, come on top. Of official datasets no file is read;
    files of the user's own are, to learn how many they are.

    Args:
      sweep: its config.

    Raises:
      UserError: for a private selection, or a config that cannot run here.
    """
    runs = sweep.runs()[: len(sweep.rows) * len(sweep.points)]
    if any(run.config.privacy.selection for run in runs):
        raise UserError("--dry_run tells nothing of a private selection: leave it out")
    lines, hours, lacks = [], 0.0, dict[str, None]()
    timed: dict[str, float] = {}
    for run in runs:
        config, updates = run.config, run.config.privacy.num_updates
        missing, kind = list(_missing(config)), _kind(config)
        lacks |= dict.fromkeys(missing)
        if not missing and kind not in timed:
            say(f"timing {run.row}, {sweep.label(run.point)}")
            timed[kind] = seconds_an_update(config)
        images = updates * config.privacy.expected_batch_size * config.method.set_size
        of_run = updates * timed.get(kind, 0.0) / 3600
        hours += of_run * sweep.seeds
        told = "-" if missing else f"{of_run:.2g}"
        numbers = f"{sweep.seeds}", f"{updates:,}", f"{images:,}", told
        lines.append([run.row, sweep.label(run.point), *numbers])
    header = "row", "column", "runs", "updates", "images a run", "hours a run"
    total = f"{len(lines) * sweep.seeds} runs, {hours:.2g} hours of updates"
    total += ", without the cells that lack files" if lacks else ""
    return "\n".join([tables.markdown(header, lines), "", total, *lacks]) + "\n"


def _kind(config: ExperimentConfig) -> str:
    """Returns what is the same for all configs whose updates take the same time."""
    values = to_dict(config)
    for group, key in (
        *(("privacy", "epsilon"), ("privacy", "delta"), ("privacy", "num_updates")),
        ("optimizer", "learning_rate"),
    ):
        del values[group][key]
    return repr(values)


def _missing(config: ExperimentConfig) -> Iterator[str]:
    """Says which files are not there, and how to get each."""
    given: dict[str, tuple[str, DataConfig | PublicConfig]]
    given, public = {"data": (config.data.name, config.data)}, config.public
    if public is not None and public.name not in RENDERED:
        given["public"] = public.files, public
    for group, (name, place) in given.items():
        fetched = place.download and place.path is None and name in datasets.SOURCES
        try:
            with named_public() if group == "public" else contextlib.nullcontext():
                datasets.location(name, place.path)
        except UserError as error:
            if fetched and datasets.public_source(name):
                continue
            yield f"missing: {error}"
    for key, path in config.finetune.files.items():
        if not pathlib.Path(path).expanduser().exists():
            yield f"missing: finetune.{key} is {path}: there is no such file"
