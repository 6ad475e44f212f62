"""The plan of a private selection: which candidates it drew, and which have begun."""

import json
import pathlib
from typing import Any

from dpmix_jax.files import write_atomically
from dpmix_jax.run.config import (
    ExperimentConfig,
    differences,
    from_config_dict,
    to_dict,
)

FILE, CANDIDATES = "plan.json", "candidates"


def write(folder: pathlib.Path, plan: dict[str, Any]) -> None:
    """Writes the plan of a selection in a folder, for its owner alone."""
    content = {**plan, "folder": str(folder.resolve())}
    write_atomically(folder / FILE, json.dumps(content), mode=0o600)


def read(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the plan of a selection in a folder, or None if there is none."""
    path = folder / FILE
    return json.loads(path.read_text()) if path.exists() else None


def is_of(plan: dict[str, Any], folder: pathlib.Path) -> bool:
    """Whether the plan was made for this folder, by a version that says so."""
    return plan.get("folder") == str(folder.resolve())


def today(config: dict[str, Any]) -> dict[str, Any]:
    """Gives a config that was kept the defaults of settings that came later."""
    return to_dict(from_config_dict(config))


def claims(config: ExperimentConfig, path: pathlib.Path) -> bool:
    """Whether a run begins as a candidate for whose selection the ledger has a line.

    The plan then remembers it: a candidate that was deleted and begins again has looked
    at the records once more, and is written down by itself.

    Args:
      config: of the run.
      path: its workdir.
    """
    path = path.resolve()
    folder = path.parent.parent
    try:
        plan = read(folder) or {}
        number, begun = int(path.name), plan.get("begun", [])
        drawn = plan["points"][plan["drawn"][number]]
        same = not differences(today(drawn), to_dict(config))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # whatever lies there is no plan, or has no such candidate
    is_candidate = path.parent.name == CANDIDATES and number >= 0
    if not (same and is_candidate and is_of(plan, folder)) or number in begun:
        return False
    write(folder, {**plan, "begun": [*begun, number]})
    return True
