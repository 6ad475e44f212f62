"""Low-rank adapters: a frozen matrix W becomes W + A B, and A and B are trained.

LoRA (Hu et al., 2022, https://arxiv.org/abs/2106.09685), private as of Yu et al. (2022,
https://arxiv.org/abs/2110.06500). Adapters are parameters beside the frozen ones: no
model knows of them, and what is released is W + A B.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dpmix_jax import sampling
from dpmix_jax.errors import require

Flat = dict[tuple[str, ...], Any]  # parameters by their paths
_NAMES = ("lora_a", "lora_b")


def init(frozen: Flat, rank: int) -> Flat:
    """Returns adapters of all frozen matrices, which change nothing yet.

    A matrix is a kernel [..., i, o], seen as [d, o] with d the product of all axes but
    the last, that mixes more than three channels i: of dense layers and convolutions,
    but not of those that read the image or each channel by itself (depthwise).

    Args:
      frozen: parameters, or their shapes.
      rank: r, at most the smaller side of each matrix.

    Returns:
      A [d, r], Gaussian of variance 1 / d from a public key, and B [r, o], zeros, by
      the path of the matrix and a name; or their shapes.

    Raises:
      UserError: if the rank is too large, or nothing frozen is a matrix.
    """
    sides = {
        path: (leaf.size // leaf.shape[-1], leaf.shape[-1])
        for path, leaf in frozen.items()
        if path[-1] == "kernel" and len(leaf.shape) > 1 and leaf.shape[-2] > 3
    }
    allowed = "None where no matrix is frozen, see finetune.trainable"
    require(bool(sides), "finetune.rank", rank, allowed)
    least = min(min(each) for each in sides.values())
    allowed = f"at most the smallest side of a frozen matrix, {least}"
    require(rank <= least, "finetune.rank", rank, allowed)

    def draw() -> Flat:
        key, adapters = sampling.stream_key(0, "init"), {}
        for i, (path, (inputs, outputs)) in enumerate(sorted(sides.items())):
            normal = jax.random.normal(jax.random.fold_in(key, i), (inputs, rank))
            adapters[*path, _NAMES[0]] = normal * inputs**-0.5
            adapters[*path, _NAMES[1]] = jnp.zeros((rank, outputs))
        return adapters

    shapes = all(isinstance(x, jax.ShapeDtypeStruct) for x in frozen.values())
    return jax.eval_shape(draw) if shapes else draw()


def are_in(flat: Flat) -> bool:
    """Whether any of these parameters is of an adapter."""
    return any(path[-1] in _NAMES for path in flat)


def merged(flat: Flat) -> Flat:
    """Adds A B to the matrix of each adapter, which thereby is gone."""
    whole = {path: leaf for path, leaf in flat.items() if path[-1] not in _NAMES}
    for path in flat:
        if path[-1] == _NAMES[0]:
            *matrix, _ = path
            a, b = (flat[*matrix, name] for name in _NAMES)
            change = jnp.matmul(a, b, precision="highest")
            kernel = whole[tuple(matrix)]
            whole[tuple(matrix)] = kernel + change.reshape(kernel.shape)
    return whole
