"""Saving and restoring the state of a run, and exporting what may be released."""

import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from dpmix_jax.training import TrainState


class Checkpoints:
    """The last two states of a run, each written whole or not at all.

    A checkpoint holds the key of the noise to come: it is secret while that is used.
    """

    def __init__(self, folder: pathlib.Path):
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Saves a state under its step, unless that is saved already."""
        step = int(state.step)
        if self._manager.latest_step() != step:
            arrays = jax.tree.map(_as_data, state)
            self._manager.save(step, args=ocp.args.StandardSave(arrays))

    def restore(self, like: TrainState) -> TrainState:
        """Returns the latest state, or `like` itself if none was saved."""
        step = self._manager.latest_step()
        if step is None:
            return like
        template = jax.tree.map(_as_data, like)
        data = self._manager.restore(step, args=ocp.args.StandardRestore(template))
        return jax.tree.map(_as_key, like, data)

    def keep_last(self) -> None:
        """Deletes all but the latest, so that no key of noise already used remains."""
        latest = str(self._manager.latest_step())
        for path in self._folder.iterdir():  # also what a kill left half written
            if path.name != latest:
                shutil.rmtree(path)
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()


def _is_key(array: jax.Array) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def _as_data(array: jax.Array) -> jax.Array:
    """Typed keys travel as the integers they are made of."""
    return jax.random.key_data(array) if _is_key(array) else array


def _as_key(like: jax.Array, data: jax.Array) -> jax.Array:
    if _is_key(like):
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
    return data


def export_weights(state: TrainState) -> bytes:
    """Packs weights, raw (`params/...`) and EMA (`ema_params/...`), as safetensors.

    These are what the guarantee covers; nothing else of the state may be released.
    """
    trees: dict[str, Any] = {"params": state.params, "ema_params": state.ema_params}
    tensors = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(trees)
    }
    return safetensors.numpy.save(tensors)
