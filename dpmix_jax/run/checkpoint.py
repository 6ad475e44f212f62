"""Saving and restoring the state of a run, and exporting what may be released."""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dpmix_jax.errors import UserError
from dpmix_jax.files import write_atomically
from dpmix_jax.models.pretrained import flat
from dpmix_jax.progress import say
from dpmix_jax.training import TrainState

PyTree = Any


class Checkpoints:
    """The last two states of a run, a file for each, that is whole or absent.

    A checkpoint holds the key of the noise to come, and for correlated noise sums
    without any: it is secret until the run ends.
    Each has a checksum, so that a damaged one is never gone on from.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def steps(self) -> list[int]:
        """Returns the updates after which a state is saved, in order."""
        paths = self._folder.glob("*.safetensors")
        return sorted(int(path.stem) for path in paths if path.stem.isdecimal())

    def save(self, state: TrainState) -> None:
        """Saves a state under its step, and forgets all but the last two."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        tensors = _tensors(state)
        content = safetensors.numpy.save(tensors, {"sha256": _checksum(tensors)})
        write_atomically(self._path(int(state.step)), content, mode=0o600)
        for step in self.steps()[:-2]:
            self._path(step).unlink()

    def restore(self, like: TrainState) -> TrainState | None:
        """Returns the latest state that is undamaged, or None if none was saved.

        A damaged file is deleted, and the one before it taken: the updates between
        them are drawn again from the same keys, so the same comes out, up to rounding.

        Args:
          like: a state of the same shapes.

        Raises:
          UserError: if states were saved, and all files are damaged, or the latest is
            that of another version.
          OSError: for a file that cannot be read, whether it is damaged or not.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)  # from now on a run has begun
        steps = self.steps()
        for step in reversed(steps):
            path = self._path(step)
            tensors = _read(path)
            if tensors is not None and tensors.keys() != flat(like).keys():
                raise UserError(f"{path} is of another version: use another --workdir")
            if tensors is not None:
                return _state(tensors, like)
            if step == steps[0]:
                raise UserError(
                    f"{path} is damaged, and there is no checkpoint before it: use"
                    " another --workdir"
                )
            say(f"{path} is damaged: going on from the checkpoint before it")
            path.unlink()
        return None

    def keep_last(self) -> None:
        """Deletes all but the latest, so that no key of noise already used remains."""
        latest = [self._path(step) for step in self.steps()[-1:]]
        for path in self._folder.iterdir():  # also what a kill left half written
            if path not in latest:
                path.unlink()

    def _path(self, step: int) -> pathlib.Path:
        return self._folder / f"{step}.safetensors"


def _tensors(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flat(tree).items()}


def _state(tensors: Mapping[str, np.ndarray], like: TrainState) -> TrainState:
    leaves = [jnp.asarray(tensors[name]) for name in flat(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _checksum(tensors: Mapping[str, np.ndarray]) -> str:
    content = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        content.update(f"{name} {array.dtype} {array.shape}".encode())
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


def _read(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """Returns the tensors of a file, or None if it is damaged.

    Raises:
      OSError: if it cannot be read, whether it is damaged or not.
    """
    with open(path, "rb"):  # safetensors does not say why it cannot open a file
        pass
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            promised = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError):
        return None
    return tensors if promised == _checksum(tensors) else None


def export_weights(params: PyTree, ema_params: PyTree) -> bytes:
    """Packs weights, raw (`params/...`) and EMA (`ema_params/...`), as safetensors.

    These are what the guarantee covers; nothing else of a state may be released.
    """
    trees = {"params": params, "ema_params": ema_params}
    return safetensors.numpy.save(_tensors(trees))
