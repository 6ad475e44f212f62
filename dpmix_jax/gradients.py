"""From a loss to the clipped sum of per-record gradients, with its sensitivity."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax_privacy import clipping

from dpmix_jax import conv
from dpmix_jax.errors import require

PyTree = Any
Weight = Callable[[jax.Array, float], jax.Array]  # of a gradient, by its norm and C


def clip(norm: jax.Array, l2_clip_norm: float) -> jax.Array:
    """Returns min(1, C / norm), which shortens long gradients (Abadi et al., 2016).

    As the `weight` of `clipped_gradient` without `per_layer`, `clip` changes nothing:
    `clipped_gradient` does the same clip last anyway.
    """
    return jnp.minimum(1.0, l2_clip_norm / jnp.maximum(norm, 1e-30))


def automatic(norm: jax.Array, l2_clip_norm: float) -> jax.Array:
    """Returns C / (norm + 0.01), which makes nearly all gradients equally long.

    With this weight, under SGD without weight decay, C is no longer a setting of its
    own: doubling C has the effect of doubling the learning rate, noise included. The
    constant 0.01 keeps gradients that are nearly 0 short (Bu et al., 2022, "Automatic
    clipping", Algorithm 1, AUTO-S).
    """
    return l2_clip_norm / (norm + 0.01)


WEIGHTS: dict[str, Weight] = {"clip": clip, "automatic": automatic}


def clipped_gradient(
    loss_fn: Callable[..., jax.Array],
    *,
    l2_clip_norm: float,
    weight: Weight = clip,
    per_layer: bool = False,
    convolutions: conv.Formulation = "auto",
    magnitudes: bool = False,
) -> clipping.BoundedSensitivityCallable:
    """Transforms a loss into the clipped sum of its per-record gradients.

    `loss_fn` gets all K images of a record at once. Where it returns the mean of their
    losses, the gradient of the record is the average over its augmentation set, clipped
    once (De et al., 2022, Section 3.2; DP-Mix, Section 3).

    Formal guarantees:
      - Record i's term depends on record i, the parameters and `constants` alone.
      - Every record's term has L2 norm at most `l2_clip_norm` (up to float32 rounding),
        whatever `weight` and `per_layer` are: the clip comes last. So adding or
        removing a record moves the sum by at most `.sensitivity(ADD_OR_REMOVE_ONE)`,
        and replacing one by at most `.sensitivity(REPLACE_ONE)`, twice as much.
      - This holds for records that are NaN, infinite or huge: components of a gradient
        that are not finite count as 0.
      - Padding contributes exactly 0.
      - The sum is formed in float32.
    The second output, losses, norms and magnitudes before the clip, is not private.

    Args:
      loss_fn: `loss_fn(params, *record) -> scalar` of one record, for instance
        `loss_fn(params, images [K, H, W, C], labels [K, O])`, the mean over K.
      l2_clip_norm: C, in [1e-10, 1e10].
      weight: `f(norm, C)` returns the factor of a gradient before the clip, such as
        `automatic`.
      per_layer: whether each of the L layers has its own factor, which is `weight` of
        that layer's norm and C / sqrt(L) (McMahan et al., 2018; He et al., 2022). A
        layer is all arrays in one container of `params`, such as a kernel and its bias,
        or one array outside any container.
      convolutions: how per-record gradients of convolutions are computed, see
        `conv.fast_convolutions`; changes speed and float rounding only.
      magnitudes: whether to add up, before the clip, the absolute values of each
        component of the gradients (DP-Mix, Figure 2).

    Returns:
      `f(params, *records, is_padding_example=None, constants=()) -> (sum, aux)`: each
      leaf of `records` has a leading axis B of records (0 is allowed),
      `is_padding_example` is [B] bool (see `sampling.batches`; None: all are records),
      `sum` is a pytree like `params`, `aux.values` [B] are the losses, `aux.grad_norms`
      [B] the norms of the gradients before weight and clip, and `aux.aux` is the sum of
      magnitudes over the records, like `params`, or None.
      `constants`, public values such as the weights of a pretrained encoder, are given
      to the loss after the record, as in `loss_fn(params, *record, *constants)`, and
      not differentiated. `f` carries `.sensitivity(neighboring_relation)`.

    Raises:
      UserError: if `l2_clip_norm` is out of that range.

    Example:
      Of the loss w . x the gradient is the record x itself. One is clipped, one is
      short already, one is NaN:

      >>> gradient_fn = dpm.clipped_gradient(lambda w, x: w @ x, l2_clip_norm=1.0)
      >>> records = jnp.array([[0.0, 4.0], [0.5, 0.0], [jnp.nan, 0.0]])
      >>> total, aux = gradient_fn(jnp.zeros(2), records)
      >>> print(total)
      [0.5 1. ]
    """
    l2_clip_norm = check_clip_norm(l2_clip_norm)
    value_and_gradient = conv.fast_convolutions(
        jax.value_and_grad(loss_fn), formulation=convolutions
    )

    plain = weight is clip and not per_layer

    def record_gradient(params, constants, record):
        value, gradient = value_and_gradient(params, *record, *constants)
        # Leaves become vectors: on CPUs XLA adds up leaves of several axes hundreds of
        # times slower where the same loop scales them (jax 0.10 and 0.12).
        gradient = jax.tree.map(jnp.ravel, gradient)
        if plain and not magnitudes:  # the clip that comes last is all there is
            return gradient, (value, None, None)
        finite = jax.tree.map(_finite, gradient)
        before = jax.tree.map(jnp.abs, finite) if magnitudes else None
        if plain:
            return gradient, (value, before, None)
        weighted = _weighted(finite, weight, l2_clip_norm, per_layer)
        return weighted, (value, before, optax.global_norm(finite))

    # The clip and the sum. jax_privacy sets components that are not finite to 0, then
    # measures the norm, then scales by min(1, C / norm), then sums over the records
    # that are no padding.
    inner = clipping.clipped_fun(
        record_gradient,
        has_aux=True,
        l2_clip_norm=l2_clip_norm,
        batch_argnums=2,
        keep_batch_dim=False,
        return_norms=True,
        dtype=jnp.float32,
    )

    def sum_of_clipped_gradients(
        params: PyTree,
        *records: PyTree,
        is_padding_example: jax.Array | None = None,
        constants: Sequence[PyTree] = (),
    ):
        size = jax.tree.leaves(records)[0].shape[0]
        if size == 0:  # jax_privacy refuses it, yet Poisson sampling draws it
            total, aux = sum_of_no_records(params)
            return total, aux._replace(aux=total if magnitudes else None)
        if is_padding_example is None:
            is_padding_example = jnp.zeros((size,), bool)
        total, ((values, before, first), norms) = inner(
            params,
            tuple(constants),
            records,
            is_padding_example=is_padding_example,
        )
        norms = norms if plain else first
        total = _like(params, total)
        if magnitudes:
            drawn = ~is_padding_example[:, None]
            before = _like(
                params, jax.tree.map(lambda x: jnp.sum(x, axis=0, where=drawn), before)
            )
        return total, clipping.AuxiliaryOutput(values, norms, before)

    return clipping.BoundedSensitivityCallable(
        sum_of_clipped_gradients, inner.l2_norm_bound, has_aux=True
    )


def _finite(x: jax.Array) -> jax.Array:
    """Returns an array in float32, with 0 for what is not finite, as the clip does."""
    return jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32)


def _weighted(
    gradient: PyTree, weight: Weight, l2_clip_norm: float, per_layer: bool
) -> PyTree:
    """Multiplies a gradient in float32, or each of its layers, by its weight."""
    paths, structure = jax.tree_util.tree_flatten_with_path(gradient)
    names = [_container(path) if per_layer else () for path, _ in paths]
    layers = {
        name: [leaf for n, (_, leaf) in zip(names, paths, strict=True) if n == name]
        for name in names
    }
    share = l2_clip_norm / len(layers) ** 0.5
    weights = {n: weight(optax.global_norm(x), share) for n, x in layers.items()}
    scaled = [
        leaf * weights[name] for name, (_, leaf) in zip(names, paths, strict=True)
    ]
    return jax.tree.unflatten(structure, scaled)


def _container(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the path of what an array lies in; Flax NNX has a variable between."""
    if path[-1:] == (jax.tree_util.GetAttrKey("value"),):
        path = path[:-1]
    return path[:-1] or path


def _like(params: PyTree, vectors: PyTree) -> PyTree:
    """Gives vectors the shapes of the parameters."""
    return jax.tree.map(lambda p, x: x.reshape(jnp.shape(p)), params, vectors)


def check_clip_norm(l2_clip_norm: float) -> float:
    """Returns C as a Python float.

    Raises:
      UserError: where squares of float32 might vanish or overflow.
    """
    require(
        1e-10 <= l2_clip_norm <= 1e10, "l2_clip_norm", l2_clip_norm, "in [1e-10, 1e10]"
    )
    return float(l2_clip_norm)


def sum_of_no_records(params: PyTree) -> tuple[PyTree, clipping.AuxiliaryOutput]:
    """Returns the sum over an empty batch, and its empty values and norms."""
    none = jnp.zeros((0,), jnp.float32)
    zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params)
    return zeros, clipping.AuxiliaryOutput(none, none, None)
