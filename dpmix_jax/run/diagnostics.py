"""How large each parameter's gradient is before the clip: DP-Mix, Figure 2.

What is kept here says more of the private records than any guarantee covers: the files
are for whoever may see the records, and nothing of them is released.
"""

import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dpmix_jax.errors import UserError
from dpmix_jax.files import write_atomically
from dpmix_jax.training import TrainState

STAGES = (20, 40, 60, 80, 100)  # in percent; the paper's are epochs 2, 4, ... of 10
FOLDER = "nonprivate_gradients"
_SUFFIX = ".safetensors"


def observed(
    updates: Iterable[tuple[TrainState, dict[str, Any]]],
    folder: pathlib.Path,
    *,
    first: int,
    num_updates: int,
    checkpoint_every: int,
) -> Iterator[tuple[TrainState, dict[str, Any]]]:
    """Passes updates on, and keeps the sums of their gradients' magnitudes.

    The sums are saved before each update after which a state is, so that a run that
    was killed goes on to the same ones.

    Args:
      updates: from `training.train`, with `magnitudes` among their sums.
      folder: receives `<update>.safetensors`; see `means`.
      first: updates that are done.
      num_updates: T.
      checkpoint_every: updates between states.

    Yields:
      The updates; their sums have `gradient_stddev` in the place of `magnitudes`: the
      standard deviation over parameters of the magnitude's mean over all records that
      were drawn so far.

    Raises:
      UserError: if the sums of a run that goes on are lost.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    seen = _restore(folder / f"{first}{_SUFFIX}") if first else {}
    step = first
    for state, sums in updates:
        step = int(state.step)
        magnitudes = jax.flatten_util.ravel_pytree(sums.pop("magnitudes"))[0]
        for name in _parts(step, num_updates):
            total, records = seen.get(name, (0.0, 0.0))
            seen[name] = total + magnitudes, records + sums["records"]
        sums["gradient_stddev"] = _stddev(*seen["all"])
        if step % checkpoint_every == 0 or step == num_updates:
            _save(folder, step, seen)
        yield state, sums
    if step < num_updates:  # stopped, and about to be saved
        _save(folder, step, seen)


def means(folder: pathlib.Path, num_updates: int) -> dict[str, np.ndarray]:
    """Returns mean magnitudes over records, before the clip, of each parameter.

    Args:
      folder: of a finished run.
      num_updates: T.

    Returns:
      Vectors over parameters: `all` of the whole training, and `20` to `100` of the
      tenth of the updates that ends at so many percent, for instance the second epoch
      of ten. A stage that no update is in is absent.
    """
    sums = _restore(folder / f"{num_updates}{_SUFFIX}")
    names = [name for name in ("all", *map(str, STAGES)) if name in sums]
    return {name: sums[name][0] / max(sums[name][1], 1.0) for name in names}


@jax.jit
def _stddev(total: jax.Array, records: jax.Array) -> jax.Array:
    return jnp.std(total / jnp.maximum(records, 1.0))


def _parts(step: int, num_updates: int) -> list[str]:
    """Returns the sums that an update belongs to."""
    tenth = 10 * -(-10 * step // num_updates)
    return ["all", str(tenth)] if tenth in STAGES else ["all"]


def _save(folder: pathlib.Path, step: int, seen: dict[str, Any]) -> None:
    """Writes the sums, and forgets all but the last three: two states and the next."""
    flat = {name: np.append(total, records) for name, (total, records) in seen.items()}
    content = safetensors.numpy.save(flat)
    write_atomically(folder / f"{step}{_SUFFIX}", content, mode=0o600)
    paths = folder.glob(f"*{_SUFFIX}")
    for path in sorted(paths, key=lambda path: int(path.stem))[:-3]:
        path.unlink()


def _restore(path: pathlib.Path) -> dict[str, Any]:
    try:
        flat = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError):
        raise UserError(f"{path} is lost or damaged: use another --workdir") from None
    return {name: (array[:-1], array[-1]) for name, array in flat.items()}
