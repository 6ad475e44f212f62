"""What a sweep would cost on this device, and what it lacks, before anything starts."""

import pathlib
from collections.abc import Iterator

from dpmix_jax.data import datasets
from dpmix_jax.data.public import RENDERED
from dpmix_jax.errors import UserError
from dpmix_jax.progress import say
from dpmix_jax.run.config import ExperimentConfig, to_dict
from dpmix_jax.run.dry_run import seconds_an_update
from dpmix_jax.sweeps import tables
from dpmix_jax.sweeps.grid import SweepConfig


def sheet(sweep: SweepConfig) -> str:
    """Returns a table of updates, images and hours by cell, and what is missing.

    Hours are of updates alone, from a few microbatches of blank images: evaluations,
    and embeddings that are kept, come on top. Of official datasets no file is read.

    Args:
      sweep: its config.
    """
    lines, seconds, lacks = [], 0.0, dict[str, None]()
    timed: dict[str, float] = {}
    for run in sweep.runs()[: len(sweep.rows) * len(sweep.points)]:
        config, privacy = run.config, run.config.privacy
        lacks |= dict.fromkeys(_missing(config))
        kind = _kind(config)
        if kind not in timed:
            say(f"timing {run.row}, {sweep.label(run.point)}")
            timed[kind] = seconds_an_update(config)
        updates = privacy.num_updates
        images = updates * privacy.expected_batch_size * config.method.set_size
        of_run = updates * timed[kind]
        seconds += of_run * sweep.seeds
        numbers = (
            f"{sweep.seeds}",
            f"{updates:,}",
            f"{images:,}",
            f"{of_run / 3600:.2g}",
        )
        lines.append([run.row, sweep.label(run.point), *numbers])
    header = "row", "column", "runs", "updates", "images a run", "hours a run"
    total = f"{len(lines) * sweep.seeds} runs, {seconds / 3600:.2g} hours of updates"
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
    places, public = [(config.data.name, config.data.path)], config.public
    if public is not None and public.name not in RENDERED:
        places.append((public.files, public.path))
    for name, path in places:
        try:
            datasets.location(name, path)
        except UserError as error:
            yield f"missing: {error}"
    for key in ("encoder", "weights"):
        path = getattr(config.finetune, key)
        if path is not None and not pathlib.Path(path).exists():
            yield f"missing: finetune.{key} is {path}: there is no such file"
