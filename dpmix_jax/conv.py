"""Convolutions that stay fast when every record has a gradient of its own.

`jax.vmap(jax.grad(loss))` asks for the weight gradient of each record: a convolution of
two arrays that both have a record axis. JAX's rule makes one convolution of all
records, with a group for each record and the output gradient as a filter as large as
the image. That is several times slower than the gradient of the same images together.
But a weight gradient has few outputs, one matrix for each tap of the kernel, and each
matrix is a plain product of a shifted image with the output gradient.

`fast_convolutions` puts these products in place of such convolutions in any gradient
function, whatever library its model is written in.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from dpmix_jax.errors import UserError, require_one_of

FORMULATIONS = ("auto", "rows", "shifted", "batch_group", "plain")

# With more taps than this a product for each costs more than one grouped convolution.
_MAX_TAPS = 64


class Batched(NamedTuple):
    """A convolution of B records, each with both operands of its own.

    Attributes:
      conv: parameters of `lax.conv_general_dilated` for one record, without
        `out_sharding`, which describes a mesh and not the convolution.
      lhs: shape [B, ...] and type of one operand.
      rhs: shape [B, ...] and type of the other.
      out: shape and type of the output of one record.
    """

    conv: dict[str, Any]
    lhs: jax.ShapeDtypeStruct
    rhs: jax.ShapeDtypeStruct
    out: jax.ShapeDtypeStruct


# One of `FORMULATIONS`, or what names one for each convolution when it is traced.
Formulation = str | Callable[[Batched], str]


def fast_convolutions(
    function: Callable[..., Any], *, formulation: Formulation = "auto"
) -> Callable[..., Any]:
    """Makes a gradient function of one record fast under `jax.vmap` over records.

    `jax.vmap(fast_convolutions(jax.grad(loss_fn)), (None, 0, 0))` returns the same as
    `jax.vmap(jax.grad(loss_fn), (None, 0, 0))`, up to float rounding. `function` is
    traced, and each of its convolutions, also inside `jit`, `remat`, `scan`, `cond` and
    custom derivatives, gets another batching rule. The new rule applies where both
    operands are batched. Take gradients first, then call `fast_convolutions`: its
    result can be differentiated again, forward and in reverse, but these derivatives
    use JAX's own rules for convolutions.

    Formal guarantees (of the result, not of its derivatives):
      - Values of a record that are not finite stay within its own gradient.
      - A convolution that crops and pads one axis reads nothing but its images.

    Args:
      function: of one record, usually `jax.grad` or `jax.value_and_grad` of a loss.
        All its arguments are traced.
      formulation: how to compute a convolution of which both operands are batched:
        `rows` (a product for each row of taps), `shifted` (a product for each tap),
        `batch_group` (one convolution with `batch_group_count`), `plain` (JAX's own
        rule), or `auto`, which chooses by shape and by the platform that is compiled
        for. Where `rows` does not apply, `shifted` replaces it; where no other
        formulation applies, `plain` is used. `formulation` may also be a function that
        takes a `Batched` and returns one of these names, see `tuning.chooser`.

    Returns:
      A function of the same signature.

    Raises:
      UserError: for an unknown formulation.

    Example:
      >>> gradient = dpm.fast_convolutions(jax.grad(lambda w, x: (w @ x) ** 2))
      >>> print(jax.vmap(gradient, (None, 0))(jnp.ones(2), jnp.eye(2)))
      [[2. 0.]
       [0. 2.]]
    """
    if isinstance(formulation, str):
        require_one_of("formulation", formulation, FORMULATIONS)

    @functools.wraps(function)
    def rewritten(*args, **kwargs):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
        leaves = jax.tree.leaves((args, kwargs))
        outputs = _evaluate(closed, leaves, formulation)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return rewritten


# A weight gradient of one record as products of matrices. `conv` holds the parameters
# of its convolution: lhs are images, rhs output gradients, outputs are taps.


def _products(conv, shape, lhs, rhs, *, rows: bool) -> jax.Array:
    """Returns a convolution's output, of this shape, computed as matrix products."""
    numbers = conv["dimension_numbers"]
    n, c, *space = numbers.lhs_spec
    o, f, *positions = numbers.rhs_spec
    images = jnp.transpose(lhs, (c, *space, n))
    gradients = jnp.transpose(rhs, (f, *positions, o))
    taps = [shape[axis] for axis in numbers.out_spec[2:]]
    found = (_rows if rows else _shifted)(conv, taps, images, gradients)
    return jnp.moveaxis(found, (-2, -1, *range(len(taps))), numbers.out_spec)


def _shifted(conv, taps: Sequence[int], images, gradients) -> jax.Array:
    """For each tap the product of a shifted slice of the images with the gradients.

    Args:
      conv: the convolution, for its window.
      taps: how many there are along each axis.
      images: [c, *space, n].
      gradients: [c, *window, o].

    Returns:
      [*taps, n, o].
    """
    images = pad(images, conv["padding"])
    found = [
        _dot(conv, window(conv, images, tap, gradients.shape[1:-1]), gradients)
        for tap in itertools.product(*map(range, taps))
    ]
    return jnp.stack(found).reshape(*taps, *found[0].shape)


def _rows(conv, taps: Sequence[int], images, gradients) -> jax.Array:
    """Like `_shifted`, but with one product for each row of taps.

    To shift images by a column is to shift gradients back by one. So the gradients,
    shifted once for each tap of a row, stand side by side in one factor, which is wide
    enough to be multiplied fast, and images are moved for each row only.
    """
    *rows, row = taps
    *above, (low, _) = conv["padding"]
    step, width, used = conv["window_strides"][-1], images.shape[-2], gradients.shape
    groups = conv["batch_group_count"]
    split = (*used[:-2], width, groups, used[-1] // groups)
    shifts = [tap * step - low for tap in range(row)]
    kept = [(0, 0)] * len(above)
    shifted = [
        pad(gradients, [*kept, (shift, width - used[-2] - shift)]).reshape(split)
        for shift in shifts
    ]
    wide = jnp.stack(shifted, axis=-2).reshape(*split[:-2], -1)
    once = {**conv, "padding": [*above, (0, 0)]}
    found = _shifted(once, [*rows, 1], images, wide)
    products = found.reshape(*rows, -1, groups, row, split[-1])
    return jnp.moveaxis(products, -2, len(rows)).reshape(*taps, -1, used[-1])


def pad(array: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
    """Pads the middle axes of [c, *space, n] with zeros; negative pads crop."""
    config = [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)]
    return lax.pad(array, jnp.zeros((), array.dtype), config)


def window(conv, images, tap: Sequence[int], spread: Sequence[int]) -> jax.Array:
    """Slices the pixels that a tap meets, for gradients of shape [c, *spread, o]."""
    steps = conv["rhs_dilation"]
    start = [i * s for i, s in zip(tap, conv["window_strides"], strict=True)]
    stop = [
        first + (size - 1) * step + 1
        for first, size, step in zip(start, spread, steps, strict=True)
    ]
    c, *_, n = images.shape
    return lax.slice(images, (0, *start, 0), (c, *stop, n), (1, *steps, 1))


def _dot(conv, images: jax.Array, gradients: jax.Array) -> jax.Array:
    """[*l, n], [*l, o] -> [n, o], in `batch_group_count` blocks; sums in float32."""
    groups = conv["batch_group_count"]
    wide = max(images.dtype, jnp.dtype("float32"), key=lambda dtype: dtype.itemsize)
    if images.shape[-1] == gradients.shape[-1] == groups > 1:  # depthwise
        products = images.astype(wide) * gradients.astype(wide)
        return products.sum(tuple(range(products.ndim - 1)))[None]
    blocks = () if groups == 1 else (groups,)
    found = lax.dot_general(
        images.reshape(-1, *blocks, images.shape[-1] // groups),
        gradients.reshape(-1, *blocks, gradients.shape[-1] // groups),
        (((0,), (0,)), ((1,), (1,)) if blocks else ((), ())),
        precision=conv["precision"],
        preferred_element_type=wide,
    )
    if blocks:  # [groups, n, o] -> [n, groups * o]
        found = jnp.moveaxis(found, 0, 1).reshape(found.shape[1], -1)
    return found


# The convolutions of all records, each with both operands of its own.


def batched(conv, formulation: Formulation, lhs, rhs) -> jax.Array:
    """Computes one convolution for each entry of the operands' leading axis."""
    plain: Callable[..., Any] = functools.partial(lax.conv_general_dilated, **conv)
    result = jax.eval_shape(lambda lhs, rhs: plain(lhs[0], rhs[0]), lhs, rhs)
    name = _named(formulation, conv, lhs, rhs, result)

    def computed(lhs, rhs, *, on_cpu: bool):
        chosen = choose(conv, result.shape, name, on_cpu)
        if chosen == "plain":
            return _apart(jax.vmap(plain), lhs, rhs)
        if chosen == "batch_group":
            return _apart(functools.partial(_batch_group, conv), lhs, rhs)
        record = functools.partial(_products, conv, result.shape, rows=chosen == "rows")
        if on_cpu:  # its batched products are slow, loops not
            out = lax.map(lambda pair: record(*pair), (lhs, rhs))
        else:
            out = jax.vmap(record)(lhs, rhs)
        return out.astype(result.dtype)

    return lax.platform_dependent(
        lhs,
        rhs,
        cpu=functools.partial(computed, on_cpu=True),
        default=functools.partial(computed, on_cpu=False),
    )


def _named(formulation: Formulation, conv, *operands_and_out) -> str:
    """Returns the name that was given, or that which is chosen for a convolution."""
    if isinstance(formulation, str):
        return formulation
    own = {key: value for key, value in conv.items() if key != "out_sharding"}
    types = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands_and_out)
    name = formulation(Batched(own, *types))
    require_one_of("formulation", name, FORMULATIONS)
    return name


def choose(conv, shape, formulation: str, on_cpu: bool) -> str:
    """Picks the formulation for an output of this shape, `plain` where none applies.

    For CPUs `auto` is timed. For accelerators it is estimated, nothing was timed: of
    WRN-16-4, 512 records of 16 images compiled for an H100, `batch_group` moves the
    fewest bytes (197 GB; `plain` 215, `rows` 290, `shifted` 335), and no formulation
    moves fewer on a TPU v5e.
    """
    out = conv["dimension_numbers"].out_spec
    taps = math.prod(shape[axis] for axis in out[2:])
    undilated = all(dilation == 1 for dilation in conv["lhs_dilation"])
    if conv["feature_group_count"] > 1 or not undilated or taps > _MAX_TAPS:
        return "plain"
    if len(out) == 2:  # a matrix product; it has no rows
        return "shifted"
    groups = conv["batch_group_count"]
    if formulation == "auto" and groups > 1:
        # JAX's rule is `batch_group` here. Products of pixels are faster than that on
        # CPUs, and on GPUs they are a few fused sums (estimated) in place of a cuDNN
        # call with a group for each channel of each record. Products of small matrices
        # are not faster on CPUs.
        pixels = shape[out[0]] * shape[out[1]] == groups
        return "shifted" if pixels else "plain"
    if formulation == "auto":
        formulation = "rows" if on_cpu else "batch_group"
    if formulation == "rows" and conv["rhs_dilation"][-1] > 1:
        return "shifted"
    return formulation


def _batch_group(conv, lhs, rhs) -> jax.Array:
    """All records in one convolution with `batch_group_count` for each record."""
    numbers = conv["dimension_numbers"]
    size = lhs.shape[0]
    out = numbers.out_spec[1]
    merged = lax.conv_general_dilated(
        _merge(lhs, numbers.lhs_spec[0]),
        _merge(rhs, numbers.rhs_spec[0]),
        **{**conv, "batch_group_count": conv["batch_group_count"] * size},
    )
    split = (*merged.shape[:out], size, -1, *merged.shape[out + 1 :])
    return jnp.moveaxis(merged.reshape(split), out, 0)


def _merge(array: jax.Array, axis: int) -> jax.Array:
    """Moves the leading record axis into another one, as its major part."""
    array = jnp.moveaxis(array, 0, axis)
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])


def _apart(function: Callable[..., jax.Array], lhs, rhs) -> jax.Array:
    """Computes all records in one convolution without one spoiling the others.

    XLA may compute groups as one dense convolution with zeros between them, and zero
    times NaN is NaN. So records with values that are not finite are computed as zeros,
    and their results are NaN.
    """
    finite = [jnp.isfinite(x).all(range(1, x.ndim)) for x in (lhs, rhs)]
    whole = jnp.logical_and(*finite)

    def choose(x, other):
        condition = whole.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(condition, x, x.dtype.type(other))

    return choose(function(choose(lhs, 0), choose(rhs, 0)), jnp.nan)


def _cropped(conv: dict[str, Any], lhs: jax.Array) -> tuple[dict[str, Any], jax.Array]:
    """Returns the same convolution, and its images, with no axis cropped and padded.

    Where an axis has a negative low and a positive high padding, XLA's code for CPUs
    (in jax 0.10) reads what follows the images in memory in place of zeros, which may
    be another record (openxla/xla#48713). So these images are dilated, cropped and
    padded beforehand.
    """
    if not _crops_and_pads(conv):
        return conv, lhs
    config = [(0, 0, 0)] * lhs.ndim
    space = conv["dimension_numbers"].lhs_spec[2:]
    each = zip(space, conv["padding"], conv["lhs_dilation"], strict=True)
    for axis, (low, high), dilation in each:
        config[axis] = (low, high, dilation - 1)
    done = {"padding": [(0, 0)] * len(space), "lhs_dilation": [1] * len(space)}
    return {**conv, **done}, lax.pad(lhs, jnp.zeros((), lhs.dtype), config)


def _crops_and_pads(conv: dict[str, Any]) -> bool:
    return any(low < 0 < high for low, high in conv["padding"])


def _convolve(conv: dict[str, Any], formulation: Formulation, lhs, rhs) -> jax.Array:
    """Computes a convolution, by our batching rule if it is batched."""
    conv, lhs = _cropped(conv, lhs)
    plain: Callable[..., Any] = functools.partial(lax.conv_general_dilated, **conv)
    convolution = jax.custom_batching.custom_vmap(plain)

    @convolution.def_vmap
    def rule(axis_size, in_batched, lhs, rhs):
        if all(in_batched):
            return batched(conv, formulation, lhs, rhs), True
        axes = [0 if is_batched else None for is_batched in in_batched]
        return jax.vmap(plain, axes, axis_size=axis_size)(lhs, rhs), True

    differentiable = jax.custom_jvp(convolution)  # a custom_vmap has no reverse mode
    differentiable.defjvps(
        lambda tangent, _, lhs, rhs: plain(tangent, rhs),
        lambda tangent, _, lhs, rhs: plain(lhs, tangent),
    )
    return differentiable(lhs, rhs)


# All that is needed of JAX's extension points is below.


def _evaluate(closed: core.ClosedJaxpr, args: Sequence[Any], formulation: Formulation):
    """Evaluates a jaxpr with its convolutions replaced."""
    try:
        return _interpret(closed.jaxpr, closed.consts, args, formulation)
    except (AttributeError, TypeError, NotImplementedError, KeyError) as error:
        problem = f"jax {jax.__version__} does not let us replace its convolutions"
        reason = f"{type(error).__name__}: {error}"
        if any(map(_mixes_records, _convolutions(closed.jaxpr))):
            raise UserError(
                f"{problem}, and its own let one record change another's where they"
                f" are grouped, or crop and pad one axis: {reason}"
            ) from None
        warnings.warn(
            f"{problem}, so that per-record gradients are slow: {reason}", stacklevel=3
        )
        return core.jaxpr_as_fun(closed)(*args)


def _mixes_records(conv: dict[str, Any]) -> bool:
    """Whether JAX's own rule needs `_apart` or `_cropped`."""
    grouped = conv["feature_group_count"] > 1 or conv["batch_group_count"] > 1
    return grouped or _crops_and_pads(conv)


def _interpret(jaxpr: core.Jaxpr, consts, args, formulation: Formulation) -> list[Any]:
    values: dict[core.Var, Any] = {}
    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs, params = [read(atom) for atom in equation.invars], equation.params
        if equation.primitive.name == "conv_general_dilated":
            outputs = [_convolve(params, formulation, *inputs)]
        else:
            params = {k: _rewrite(v, formulation) for k, v in params.items()}
            outputs = list(bind(equation, inputs, params))
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def bind(equation, inputs: Sequence[Any], params: dict[str, Any]) -> Sequence[Any]:
    """Evaluates an equation of a jaxpr with these inputs and parameters."""
    params = equation.primitive.get_bind_params(params)
    with equation.ctx.manager:
        found = equation.primitive.bind(*inputs, **params)
    return found if equation.primitive.multiple_results else [found]


def _rewrite(param: Any, formulation: Formulation) -> Any:
    """Rewrites the jaxprs in a parameter of an equation, if they hold a convolution."""
    if type(param) in (tuple, list):
        return type(param)(_rewrite(item, formulation) for item in param)
    # jax 0.11 has one class for both, so that what is closed comes first.
    if not isinstance(param, core.ClosedJaxpr):
        if not isinstance(param, core.Jaxpr) or param.constvars:
            return param
        closed = _rewrite(core.ClosedJaxpr(param, ()), formulation)
        return param if closed.consts else closed.jaxpr
    if not any(_convolutions(param.jaxpr)):
        return param
    shapes = [var.aval for var in param.jaxpr.invars]
    return jax.make_jaxpr(
        lambda *args: _interpret(param.jaxpr, param.consts, args, formulation)
    )(*shapes)


def _convolutions(jaxpr: core.Jaxpr) -> Iterator[dict[str, Any]]:
    """Yields the parameters of each convolution in a jaxpr and those within it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield equation.params
        for inner in inner_jaxprs(equation.params):
            yield from _convolutions(inner)


def inner_jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """Yields the jaxprs among the parameters of an equation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
