"""Weights that models start from: CLIP's image towers, or an earlier run's.

Nothing is downloaded here. For the towers of DP-Mix (Bao et al., 2023),

    hf download laion/CLIP-ViT-B-16-laion2B-s34B-b88K open_clip_model.safetensors
    hf download laion/CLIP-convnext_base_w-laion2B-s13B-b82K open_clip_model.safetensors

print the path of a file each. The WRN-28-10 that De et al. (2022) pre-trained on 32x32
ImageNet, dm_jax_privacy/models/WRN_28_10_IMAGENET32.dill in Google's storage, is a
pickle, which runs whatever code it holds; where it is trusted,

    params = dill.load(open("WRN_28_10_IMAGENET32.dill", "rb"))["params"]
    leaves = [(m, n, numpy.asarray(v)) for m in params for n, v in params[m].items()]
    arrays = {f"{module}/{name}": leaf for module, name, leaf in leaves}
    safetensors.numpy.save_file(arrays, "wrn_28_10_imagenet32.safetensors")

makes a file of it that `load_weights` reads.
"""

import fcntl
import hashlib
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dpmix_jax.errors import UserError
from dpmix_jax.models import dialects
from dpmix_jax.models.dialects import Dialect
from dpmix_jax.models.tensor_files import StoredArray, open_arrays
from dpmix_jax.places import cache_folder
from dpmix_jax.progress import say

PyTree = Any
Shapes = Mapping[str, tuple[int, ...]]

_VERSION = 1  # of the conversion
_TOWERS = {  # by a parameter that only one has
    "class_embedding": (dialects.VIT, "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
    "stem/kernel": (
        dialects.CONVNEXT,
        "laion/CLIP-convnext_base_w-laion2B-s13B-b82K",
    ),
}


def load_encoder(path: str | os.PathLike, like: PyTree) -> PyTree:
    """Loads a pretrained image tower into the encoder of `vit` or `convnext`.

    The file is a safetensors file or what `torch.save` wrote of a state dict: of
    open_clip, the whole model or `visual` alone; of transformers, `CLIPModel` or
    `CLIPVisionModel` with or without projection; or of timm (where the projection is
    the classifier). Every key and shape must be that of the model; positions are not
    interpolated to another image size. The result is kept in the cache, under the
    checksum of the file.

    What a file cannot say is the number of heads, and which GELU its tower was trained
    with: ours is the exact one, OpenAI's weights want `x * sigmoid(1.702 x)`.

    Args:
      path: of the file.
      like: `params["encoder"]` of the model, or the shapes of it.

    Returns:
      A tree as `like`, of NumPy arrays in float32.

    Raises:
      UserError: if the file is missing, of neither format, damaged or not finite, or if
        keys or shapes are not those of the model.
    """
    path, wanted = pathlib.Path(path), _flat(like)
    towers = [tower for sign, tower in _TOWERS.items() if sign in wanted]
    if not towers:
        raise ValueError(
            "like must be the parameters of the encoder of vit or convnext"
        )
    spoken, repository = towers[0]
    if not path.is_file():
        raise UserError(
            f"weights are {path}: it must be a file, for instance the one that `hf"
            f" download {repository} open_clip_model.safetensors` prints"
        )
    shapes = {key: leaf.shape for key, leaf in wanted.items()}
    identity = repr((_VERSION, checksum(path), sorted(shapes.items())))
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    cached = cache_folder() / "encoders" / f"{name}.safetensors"
    found = _read_cache(cached, shapes)
    if found is None:
        found = _convert(path, shapes, spoken)
        _write_cache(cached, found)
    return _unflat(like, found)


def load_weights(
    path: str | os.PathLike,
    like: PyTree,
    *,
    ema: bool = True,
    skip: Collection[str] = (),
) -> PyTree:
    """Loads the `model.safetensors` of a run into the parameters of the same model.

    For `wrn` a file with the names of De et al. (2022) will do as well.

    Args:
      path: of the file, see `checkpoint.export_weights`.
      like: parameters of the model, as `init` returns them.
      ema: whether to take the averaged weights, not the last.
      skip: names of modules that are left as they are in `like`, and may differ in the
        file, such as `head`, or `Dense_0` of `wrn`, for a model of other classes.

    Returns:
      A tree as `like`, of NumPy arrays, but for what is skipped.

    Raises:
      UserError: if the file is missing, damaged or not finite, if keys or shapes are
        not those of `like`, or if it has no module of a name in `skip`.
    """
    path, wanted = pathlib.Path(path), _flat(like)
    for name in skip:
        if not any(name in key.split("/") for key in wanted):
            raise UserError(
                f"skip is {name!r}: it must be the name of a module of the model"
            )
    if not path.is_file():
        raise UserError(
            f"weights are {path}: it must be a file, the model.safetensors of a run"
        )
    prefix = "ema_params/" if ema else "params/"
    with open_arrays(path) as stored:
        keys, what = {key: prefix + key for key in wanted}, "weights of the same model"
        theirs = dialects.jax_privacy_keys(wanted)
        if theirs and any(key.startswith("wide_res_net/") for key in stored):
            keys, prefix = theirs, "wide_res_net/"
            what = f"{what} as jax_privacy names them"
        # Modules to skip go by our names, and in the file perhaps by others.
        known = {
            theirs.rsplit("/", 1)[0]: ours.split("/")[:-1]
            for ours, theirs in keys.items()
        }

        def skipped(key: str) -> bool:
            names = {*key.split("/"), *known.get(key.rsplit("/", 1)[0], ())}
            return not names.isdisjoint(skip)

        shapes = {
            theirs: wanted[ours].shape
            for ours, theirs in keys.items()
            if not skipped(theirs)
        }
        unexpected = [
            key
            for key in stored
            if key.startswith(prefix) and key not in shapes and not skipped(key)
        ]
        _check(path, what, stored, shapes, unexpected)
        found = {
            ours: _read(path, theirs, stored[theirs])
            for ours, theirs in keys.items()
            if theirs in shapes
        }
    return _unflat(like, found)


# From a file to parameters by path.


def _convert(
    path: pathlib.Path, shapes: Shapes, spoken: Iterable[Dialect]
) -> dict[str, np.ndarray]:
    """Reads parameters of given shapes from a file in one of some dialects."""
    with open_arrays(path) as stored:
        # What PyTorch wraps a model in that is trained on several devices.
        stored = {key.removeprefix("module."): array for key, array in stored.items()}
        dialect, sources = _recognized(path, shapes, spoken, stored)
        expected = {key: shape for parts in sources.values() for key, shape in parts}
        unexpected = _unexpected(dialect, shapes, stored, expected)
        what = f"the image tower of this model as {dialect.name} names it"
        _check(path, what, stored, expected, unexpected)
        found = {}
        for ours, parts in sources.items():
            arrays = [_read(path, key, stored[key]) for key, _ in parts]
            converted = dialect.convert(ours, shapes[ours], arrays)
            found[ours] = np.ascontiguousarray(converted)
        return found


def _recognized(
    path: pathlib.Path,
    shapes: Shapes,
    spoken: Iterable[Dialect],
    stored: Mapping[str, StoredArray],
) -> tuple[Dialect, dict[str, list[tuple[str, tuple[int, ...]]]]]:
    """Returns the dialect of a file, and keys and shapes for each of our parameters."""
    best: tuple[int, Any, Any] = (0, None, None)
    for dialect in spoken:
        sources = {
            ours: list(dialect.source(ours, shape).items())
            for ours, shape in shapes.items()
        }
        known = sum(key in stored for parts in sources.values() for key, _ in parts)
        if known > best[0]:
            best = known, dialect, sources
    if not best[0]:
        names = " or ".join(dict.fromkeys(dialect.name for dialect in spoken))
        raise UserError(
            f"weights are {path}: it must be an image tower of this model as {names}"
            f" names it, but its keys are {min(stored, default='none')} and the like"
        )
    return best[1:]


def _unexpected(
    dialect: Dialect,
    shapes: Shapes,
    stored: Mapping[str, StoredArray],
    expected: Collection[str],
) -> list[str]:
    """Returns the keys of a file that are neither the model's nor another tower's."""

    def harmless(key: str) -> bool:
        if key != dialect.zero or "proj/kernel" not in shapes:
            return re.match(dialect.ignored, key) is not None
        size = shapes["proj/kernel"][1:]
        return stored[key].shape == size and not stored[key].read().any()

    return [key for key in stored if key not in expected and not harmless(key)]


def _check(
    path: pathlib.Path,
    what: str,
    stored: Mapping[str, StoredArray],
    expected: Shapes,
    unexpected: Sequence[str],
) -> None:
    """Raises `UserError` if keys are missing or unexpected, or shapes wrong."""
    missing = [key for key in expected if key not in stored]
    wrong = [
        f"{key} is {stored[key].shape}, not {shape}{_size_hint(key, stored, expected)}"
        for key, shape in expected.items()
        if key in stored and stored[key].shape != shape
    ]
    faults = [
        f"{found[0]}{said}" + f" (and {len(found) - 1} more)" * (len(found) > 1)
        for found, said in (
            (wrong, ""),
            (missing, " is missing"),
            (unexpected, " is unexpected"),
        )
        if found
    ]
    if faults:
        raise UserError(f"weights are {path}: it must be {what}; {', '.join(faults)}")


def _size_hint(key: str, stored: Mapping[str, StoredArray], expected: Shapes) -> str:
    """Says which images positions are for, where those are of another number."""
    if "pos" not in key or stored[key].shape[-1:] != expected[key][-1:]:
        return ""
    kernel = next(shape for shape in expected.values() if len(shape) == 4)
    sides = [
        round((shape[-2] - 1) ** 0.5) * kernel[-1]
        for shape in (stored[key].shape, expected[key])
    ]
    return (
        f": it is for images of {sides[0]}x{sides[0]} pixels, not {sides[1]}x{sides[1]}"
    )


def _read(path: pathlib.Path, key: str, stored: StoredArray) -> np.ndarray:
    """Returns an array as float32."""
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        raise UserError(
            f"weights are {path}: {key} is {stored.dtype}, it must be float"
        )
    array = stored.read().astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"weights are {path}: {key} is not finite, it must be")
    return array


def _flat(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, as `checkpoint` names them."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _unflat(like: PyTree, found: Mapping[str, np.ndarray]) -> PyTree:
    """Returns a tree as `like` with the leaves found; others stay."""
    leaves = [found.get(key, leaf) for key, leaf in _flat(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


# The cache of converted encoders.


def checksum(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file, or raises `UserError` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"weights are {path}: it must be readable ({error.strerror})"
        ) from None


def _read_cache(path: pathlib.Path, shapes: Shapes) -> dict[str, np.ndarray] | None:
    """Returns what the cache has, or None if it is not there or damaged."""
    if not path.exists():
        return None
    try:
        found = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError):
        return None
    fits = {key: array.shape for key, array in found.items()} == dict(shapes)
    return found if fits else None


def _write_cache(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file that is whole or absent; without a place to write, none."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes, one at a time
            try:
                safetensors.numpy.save_file(dict(arrays), partial)
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
    except (OSError, safetensors.SafetensorError) as error:
        say(f"warning: the encoder is not kept in the cache {path}: {error}")
