"""Weights that models start from: of CLIP's image towers, De et al. or earlier runs.

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

import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dpmix_jax.errors import UserError, require

PyTree = Any

# What open_clip calls the layers and parameters of its image towers, after `visual.`.
# `{}` stands for the numbers of stages and blocks; a kernel or scale is a `.weight`
# there, a bias a `.bias`.
_VIT = {
    "class_embedding": "class_embedding",
    "positional_embedding": "positional_embedding",
    "patches": "conv1",
    "ln_pre": "ln_pre",
    "block_{}/norm1": "transformer.resblocks.{}.ln_1",
    "block_{}/qkv/kernel": "transformer.resblocks.{}.attn.in_proj_weight",
    "block_{}/qkv/bias": "transformer.resblocks.{}.attn.in_proj_bias",
    "block_{}/out": "transformer.resblocks.{}.attn.out_proj",
    "block_{}/norm2": "transformer.resblocks.{}.ln_2",
    "block_{}/fc1": "transformer.resblocks.{}.mlp.c_fc",
    "block_{}/fc2": "transformer.resblocks.{}.mlp.c_proj",
    "ln_post": "ln_post",
    "proj/kernel": "proj",
}
_CONVNEXT = {
    "stem": "trunk.stem.0",
    "stem_norm": "trunk.stem.1",
    "downsample_{}_norm": "trunk.stages.{}.downsample.0",
    "downsample_{}": "trunk.stages.{}.downsample.1",
    "stage_{}_{}/gamma": "trunk.stages.{}.blocks.{}.gamma",
    "stage_{}_{}/conv": "trunk.stages.{}.blocks.{}.conv_dw",
    "stage_{}_{}/norm": "trunk.stages.{}.blocks.{}.norm",
    "stage_{}_{}/fc1": "trunk.stages.{}.blocks.{}.mlp.fc1",
    "stage_{}_{}/fc2": "trunk.stages.{}.blocks.{}.mlp.fc2",
    "norm": "trunk.head.norm",
    "proj": "head.proj",
}
_TOWERS = {  # by a parameter that only one tower has
    "class_embedding": (_VIT, "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
    "stem/kernel": (_CONVNEXT, "laion/CLIP-convnext_base_w-laion2B-s13B-b82K"),
}


def load_encoder(path: str | os.PathLike, like: PyTree) -> PyTree:
    """Loads an image tower of open_clip into the encoder of `vit` or `convnext`.

    The file holds the whole model of open_clip, or its `visual` alone. It is a
    safetensors file or, where PyTorch is installed, what `torch.save` wrote of a state
    dict. Every key and shape of the tower must be that of the model; positions are not
    interpolated to another image size.

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
    path, wanted = pathlib.Path(path).expanduser(), flat(like)
    towers = [tower for sign, tower in _TOWERS.items() if sign in wanted]
    if not towers:
        raise UserError(
            f"finetune.encoder is {path}: it must be None for a model whose encoder is"
            " not that of vit or convnext; finetune.weights takes a whole model"
        )
    names, repository = towers[0]
    hint = f"the one that `hf download {repository} open_clip_model.safetensors` prints"
    stored = _read(path, f"for instance {hint}")
    stored = {key: _in_our_order(key, array) for key, array in stored.items()}
    # PyTorch adds `module.` to a model that is trained on several devices.
    prefixes = ("visual.", "module.visual.")
    prefix = next((p for p in prefixes if any(k.startswith(p) for k in stored)), "")
    keys = {ours: prefix + _open_clip_key(ours, names) for ours in wanted}
    what = "the image tower of this model as open_clip names it"
    return _fill(path, stored, keys, like, prefix, what)


def load_weights(
    path: str | os.PathLike, like: PyTree, *, skip: Collection[str] = ()
) -> PyTree:
    """Loads the averaged weights of a run into the parameters of the same model.

    For `wrn` a file with the names of De et al. (2022) will do as well.

    Args:
      path: of the `model.safetensors` of the run, see `checkpoint.export_weights`.
      like: parameters of the model, as `init` returns them, or the shapes of them.
      skip: names of modules that are left as they are in `like`, and may have other
        shapes in the file, such as `head`, or `Dense_0` of `wrn`, for other classes.

    Returns:
      A tree as `like`, of NumPy arrays in float32, but for what is skipped.

    Raises:
      UserError: if the file is missing, damaged or not finite, if keys or shapes are
        not those of `like`, or if the model has no module of a name in `skip`.
    """
    path, wanted = pathlib.Path(path).expanduser(), flat(like)
    for name in skip:
        known = any(name in key.split("/") for key in wanted)
        allowed = "the name of a module of the model"
        require(known, "finetune.skip", name, allowed)
    stored = _read(path, "the model.safetensors of a run")
    what, prefix = "weights of the same model", "ema_params/"
    keys = {ours: prefix + ours for ours in wanted}
    if any(key.startswith("wide_res_net/") for key in stored):
        what, prefix = f"{what} as jax_privacy names them", "wide_res_net/"
        keys = _de_et_al_keys(wanted)
    return _fill(path, stored, keys, like, prefix, what, skip)


def checksum(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file, or raises `UserError` if it cannot be read."""
    try:
        with open(pathlib.Path(path).expanduser(), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"weights are {path}: it must be readable ({error.strerror})"
        ) from None


# From a file to arrays by key.


def _read(path: pathlib.Path, hint: str) -> dict[str, np.ndarray]:
    """Returns all arrays of a file; `hint` says which file could be meant."""
    if not path.is_file():
        raise UserError(f"weights are {path}: it must be a file, {hint}")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start.startswith(b"PK"):
            return _read_torch(path)
        if start[:1] == b"\x80" and start[8:] != b"{":
            raise UserError(
                f"weights are {path}: it must not be a pickle, which runs whatever code"
                f" it holds; {__name__} has the lines that convert De et al.'s"
            )
        return safetensors.numpy.load_file(path)
    except UserError:
        raise
    except Exception as error:  # damage makes decoders raise whatever they like
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"weights are {path}: it must be a safetensors file or a state dict of"
            f" tensors that torch.save wrote, whole and not damaged ({reason})"
        ) from None


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict; runs no code that is in the file."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"weights are {path}: to read a file of PyTorch, install torch, or convert"
            " the file where torch is installed, by this line of Python: import torch,"
            f" safetensors.torch as st; d = torch.load({str(path)!r},"
            " map_location='cpu', weights_only=True); st.save_file({k:"
            " v.contiguous().clone() for k, v in d.get('state_dict', d).items()},"
            f" {str(path.with_suffix('.safetensors'))!r})"
        ) from None
    content = torch.load(path, map_location="cpu", weights_only=True)
    content = content.get("state_dict", content)
    return {
        key: (v.float() if v.is_floating_point() else v).detach().numpy()
        for key, v in content.items()
    }


# From arrays by key to parameters.


def _fill(
    path: pathlib.Path,
    stored: Mapping[str, np.ndarray],
    keys: Mapping[str, str],
    like: PyTree,
    prefix: str,
    what: str,
    skip: Collection[str] = (),
) -> PyTree:
    """Returns `like` with arrays of a file in the places of its leaves.

    Args:
      path: of the file, for errors.
      stored: its arrays.
      keys: the key of each leaf, by its path.
      like: the tree.
      prefix: of all keys of the file that must have a place.
      what: says which weights the file must have.
      skip: names of modules whose leaves stay as they are.
    """
    wanted, stays = flat(like), {*skip}
    places = {ours: k for ours, k in keys.items() if stays.isdisjoint(ours.split("/"))}
    wrong = [
        f"{key!r} is {stored[key].shape}, not {wanted[ours].shape}"
        + ", for images of another size" * key.endswith("positional_embedding")
        for ours, key in places.items()
        if key in stored and stored[key].shape != wanted[ours].shape
    ]
    missing = [f"{key!r} is missing" for key in places.values() if key not in stored]
    more = (key for key in stored if key.startswith(prefix))
    unexpected = [f"{key!r} is unexpected" for key in more if key not in keys.values()]
    faults = [
        found[0] + f" (and {len(found) - 1} more)" * (len(found) > 1)
        for found in (wrong, missing, unexpected)
        if found
    ]
    if faults:
        raise UserError(f"weights are {path}: it must be {what}; {', '.join(faults)}")
    found = {ours: _float32(path, key, stored[key]) for ours, key in places.items()}
    leaves = [found.get(ours, leaf) for ours, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _float32(path: pathlib.Path, key: str, array: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(
            f"weights are {path}: {key!r} is {array.dtype}, it must be float"
        )
    array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"weights are {path}: {key!r} is not finite, it must be")
    return array


def flat(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, as `checkpoint` names them."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# Names and axes of others.


def _open_clip_key(path: str, names: Mapping[str, str]) -> str:
    """Returns open_clip's key of a parameter."""
    numbers = re.findall(r"_(\d+)(?=[_/])", path)
    path = re.sub(r"_\d+(?=[_/])", "_{}", path)
    if path in names:
        return names[path].format(*numbers)
    layer, leaf = path.rsplit("/", 1)
    return f"{names[layer].format(*numbers)}.{'bias' if leaf == 'bias' else 'weight'}"


def _in_our_order(key: str, array: np.ndarray) -> np.ndarray:
    """Transposes weights of PyTorch's layers: inputs before outputs, height first."""
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(array.ndim)
    return array.transpose(axes) if axes and key.endswith("weight") else array


_HAIKU = {  # De et al.'s names of parameters, by our kinds of layers
    "WSConv": {"kernel": "w", "gain": "gain", "bias": "bias"},
    "GroupNorm": {"scale": "scale", "bias": "offset"},
    "Dense": {"kernel": "w", "bias": "b"},
}


def _de_et_al_keys(paths: Collection[str]) -> dict[str, str]:
    """Returns the key of each parameter of `wrn` in a file of De et al.'s weights.

    Args:
      paths: of all parameters, `params/<module>/<leaf>`.

    Returns:
      Keys `wide_res_net/<module>/<leaf>` by path; of another model such keys as no file
      has.
    """
    modules = _de_et_al_modules(depth=sum(path.endswith("/gain") for path in paths))
    keys = {}
    for path in paths:
        module, leaf = path.removeprefix("params/").split("/", 1)
        leaf = _HAIKU.get(module.partition("_")[0], {}).get(leaf, leaf)
        keys[path] = f"wide_res_net/{modules.get(module, module)}/{leaf}"
    return keys


def _de_et_al_modules(depth: int) -> dict[str, str]:
    """Returns their name of each module of `wrn`, which has `depth` convolutions."""
    convolutions, norms = ["First_conv"], []
    for stage, block in itertools.product((1, 2, 3), range((depth - 4) // 6)):
        if block == 0:
            convolutions.append(f"Block_{stage}_skip_conv")
            norms.append(f"Block_{stage}_skip_norm")
        for step in (0, 1):
            convolutions.append(f"Block_{stage}Conv_{block}_{step}")
            norms.append(f"Block_{stage}_norm_{block}_{step}")
    norms.append("Final_norm")
    return {
        **{f"WSConv_{i}": name for i, name in enumerate(convolutions)},
        **{f"GroupNorm_{i}": name for i, name in enumerate(norms)},
        "Dense_0": "Softmax",
    }
