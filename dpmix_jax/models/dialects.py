"""What others call the parameters of the image towers.

Parameters are named by their paths, with `{}` for the numbers of stages and blocks:
`block_{}/fc1/kernel`. A table says for a layer, or for one parameter of it, what it is
called elsewhere; a kernel or scale is a `.weight` there, a bias a `.bias`.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

_LEAVES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The names of one library.

    Attributes:
      name: of the library.
      table: from our layers, or parameters, to its; `a|b|c` for one that is in parts.
      ignored: a regular expression for keys of the file that are of other towers.
      as_ours: keys of matrices that are [inputs, outputs] as ours are.
      batched: how many axes of size 1 come first, by key.
      zero: key of a bias that the projection has not here, so that it must be zero.
    """

    name: str
    table: Mapping[str, str]
    ignored: str = r"(?!)"
    as_ours: Collection[str] = ()
    batched: Mapping[str, int] = dataclasses.field(default_factory=dict)
    zero: str = ""

    def source(self, path: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Returns the keys, and their shapes, that a parameter of ours is made of."""
        keys = self._keys(path)
        if path.endswith("/kernel") and len(shape) == 4:
            height, width, inputs, outputs = shape
            return {keys[0]: (outputs, inputs, height, width)}
        if path.endswith("/kernel") and keys[0] not in self.as_ours:
            inputs, outputs = shape
            return dict.fromkeys(keys, (outputs // len(keys), inputs))
        first, *rest = (*[1] * self.batched.get(keys[0], 0), *shape)
        return dict.fromkeys(keys, (first // len(keys), *rest))

    def convert(
        self, path: str, shape: tuple[int, ...], parts: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Makes a parameter of ours from the arrays of `source`, in their order."""
        if len(shape) == 4:
            return parts[0].transpose(2, 3, 1, 0)
        joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if path.endswith("/kernel") and self._keys(path)[0] not in self.as_ours:
            return joined.T
        return joined.reshape(shape)

    def _keys(self, path: str) -> tuple[str, ...]:
        numbers = re.findall(r"_(\d+)(?=[_/])", path)
        path = re.sub(r"_\d+(?=[_/])", "_{}", path)
        found = self.table.get(path)
        if found is None:
            layer, leaf = path.rsplit("/", 1)
            parts = self.table[layer].split("|")
            found = "|".join(part + _LEAVES[leaf] for part in parts)
        return tuple(key.format(*numbers) for key in found.split("|"))


def _open_clip_vit(prefix: str, ignored: str) -> Dialect:
    block = prefix + "transformer.resblocks.{}"
    return Dialect(
        name="open_clip",
        table={
            "class_embedding": f"{prefix}class_embedding",
            "positional_embedding": f"{prefix}positional_embedding",
            "patches": f"{prefix}conv1",
            "ln_pre": f"{prefix}ln_pre",
            "block_{}/norm1": f"{block}.ln_1",
            "block_{}/qkv/kernel": f"{block}.attn.in_proj_weight",
            "block_{}/qkv/bias": f"{block}.attn.in_proj_bias",
            "block_{}/out": f"{block}.attn.out_proj",
            "block_{}/norm2": f"{block}.ln_2",
            "block_{}/fc1": f"{block}.mlp.c_fc",
            "block_{}/fc2": f"{block}.mlp.c_proj",
            "ln_post": f"{prefix}ln_post",
            "proj/kernel": f"{prefix}proj",
        },
        ignored=ignored,
        as_ours=(f"{prefix}proj",),
    )


def _transformers_vit(prefix: str) -> Dialect:
    block = prefix + "encoder.layers.{}"
    return Dialect(
        name="transformers",
        table={
            "class_embedding": f"{prefix}embeddings.class_embedding",
            "positional_embedding": f"{prefix}embeddings.position_embedding.weight",
            "patches": f"{prefix}embeddings.patch_embedding",
            "ln_pre": f"{prefix}pre_layrnorm",  # as it is spelt there
            "block_{}/norm1": f"{block}.layer_norm1",
            "block_{}/qkv": "|".join(f"{block}.self_attn.{c}_proj" for c in "qkv"),
            "block_{}/out": f"{block}.self_attn.out_proj",
            "block_{}/norm2": f"{block}.layer_norm2",
            "block_{}/fc1": f"{block}.mlp.fc1",
            "block_{}/fc2": f"{block}.mlp.fc2",
            "ln_post": f"{prefix}post_layernorm",
            "proj": "visual_projection",
        },
        ignored=rf"text_|logit_|{re.escape(prefix)}embeddings\.position_ids$",
    )


_TIMM_VIT = Dialect(
    name="timm",
    table={
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "patches": "patch_embed.proj",
        "ln_pre": "norm_pre",
        "block_{}/norm1": "blocks.{}.norm1",
        "block_{}/qkv": "blocks.{}.attn.qkv",
        "block_{}/out": "blocks.{}.attn.proj",
        "block_{}/norm2": "blocks.{}.norm2",
        "block_{}/fc1": "blocks.{}.mlp.fc1",
        "block_{}/fc2": "blocks.{}.mlp.fc2",
        "ln_post": "norm",
        "proj": "head",
    },
    batched={"cls_token": 2, "pos_embed": 1},
    zero="head.bias",
)


def _convnext(name: str, trunk: str, projection: str, ignored: str) -> Dialect:
    """open_clip's tower is timm's, with a projection of its own."""
    block = trunk + "stages.{}.blocks.{}"
    return Dialect(
        name=name,
        table={
            "stem": f"{trunk}stem.0",
            "stem_norm": f"{trunk}stem.1",
            "downsample_{}_norm": f"{trunk}stages.{{}}.downsample.0",
            "downsample_{}": f"{trunk}stages.{{}}.downsample.1",
            "stage_{}_{}/gamma": f"{block}.gamma",
            "stage_{}_{}/conv": f"{block}.conv_dw",
            "stage_{}_{}/norm": f"{block}.norm",
            "stage_{}_{}/fc1": f"{block}.mlp.fc1",
            "stage_{}_{}/fc2": f"{block}.mlp.fc2",
            "norm": f"{trunk}head.norm",
            "proj": projection,
        },
        ignored=ignored,
        zero="" if trunk else f"{projection}.bias",
    )


# Of open_clip's text tower, as its own module or among the keys of the whole.
_TEXT = (
    r"(text\.|transformer\.|token_embedding\.|ln_final\.)"
    r"|(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask)$"
)
VIT = (
    _open_clip_vit("visual.", _TEXT),
    _open_clip_vit("", r"(?!)"),
    _transformers_vit("vision_model."),
    _transformers_vit(""),  # what transformers 5 saves of a tower alone
    _TIMM_VIT,
)
CONVNEXT = (
    _convnext("open_clip", "visual.trunk.", "visual.head.proj", _TEXT),
    _convnext("open_clip", "trunk.", "head.proj", r"(?!)"),
    _convnext("timm", "", "head.fc", r"(?!)"),
)


def jax_privacy_wrn(depth: int) -> dict[str, str]:
    """Returns what De et al. (2022) call each module of `wrn`, in the order of calls.

    Args:
      depth: of the network, which is also its number of convolutions.
    """
    convolutions, norms = ["First_conv"], []
    for stage in (1, 2, 3):
        for block in range((depth - 4) // 6):
            names = [("_skip_norm", "_skip_conv")] if block == 0 else []
            for step in (0, 1):
                names.append((f"_norm_{block}_{step}", f"Conv_{block}_{step}"))
            norms += [f"Block_{stage}{norm}" for norm, _ in names]
            convolutions += [f"Block_{stage}{convolution}" for _, convolution in names]
    norms.append("Final_norm")
    return {
        **{f"WSConv_{i}": name for i, name in enumerate(convolutions)},
        **{f"GroupNorm_{i}": name for i, name in enumerate(norms)},
        "Dense_0": "Softmax",
    }


_HAIKU = {  # leaves, by the kind of module
    "WSConv": {"kernel": "w", "gain": "gain", "bias": "bias"},
    "GroupNorm": {"scale": "scale", "bias": "offset"},
    "Dense": {"kernel": "w", "bias": "b"},
}


def jax_privacy_keys(paths: Collection[str]) -> dict[str, str] | None:
    """Returns the key of each parameter of `wrn` in a file of De et al.'s weights.

    Args:
      paths: of all parameters, `params/<module>/<leaf>`.

    Returns:
      Keys `wide_res_net/<module>/<leaf>` by path, or None for another model.
    """
    depth = sum(path.endswith("/gain") for path in paths)
    modules, keys = jax_privacy_wrn(depth), {}
    for path in paths:
        _, module, *leaf = path.split("/")
        if module not in modules or len(leaf) != 1:
            return None
        theirs = _HAIKU[module.partition("_")[0]][leaf[0]]
        keys[path] = f"wide_res_net/{modules[module]}/{theirs}"
    return keys
