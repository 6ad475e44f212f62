"""Convolutions that stay fast when every record has a gradient of its own.

`jax.vmap(jax.grad(loss))` asks for the weight gradient of each record: a convolution of
two arrays that both have a record axis. JAX's rule makes one convolution of it, with a
group for each record and the output gradient as a filter as large as the image, which
is several times slower than the gradient of the same images together. But a weight
gradient has few outputs, one matrix for each tap of the kernel, and each is a plain
matrix product of a shifted image with the output gradient.

`fast_convolutions` puts these products in place of such convolutions in any gradient
function, whatever library its model is written in.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from dpmix_jax.errors import UserError

FORMULATIONS = ("auto", "rows", "shifted", "flat", "batch_group", "plain")

# With more taps than this a product for each costs more than one grouped convolution.
_MAX_TAPS = 64


def fast_convolutions(
    function: Callable[..., Any], *, formulation: str = "auto"
) -> Callable[..., Any]:
    """Makes a gradient function of one record fast under `jax.vmap` over records.

    `jax.vmap(fast_convolutions(jax.grad(loss_fn)), (None, 0, 0))` returns what it
    returns without, to float rounding. The function is traced, and each convolution in
    it, also inside `jit`, `remat`, `scan`, `cond` and custom derivatives, is replaced
    by one with another batching rule, which applies where both operands are batched;
    everything else is left as it is. Take gradients first, then call this: the result
    can be differentiated again, forward and in reverse, but at the speed of JAX's rule.

    Args:
      function: of one record, usually `jax.grad` or `jax.value_and_grad` of a loss.
        All its arguments are traced.
      formulation: how to compute a convolution of which both operands are batched:
        `rows` (a product for each row of taps; stride 1), `shifted` (a product of a
        shifted slice for each tap), `flat` (the same of contiguous slices; stride 1),
        `batch_group` (one convolution with `batch_group_count`), `plain` (JAX's own
        rule), or `auto`, which chooses by backend and shape. Where `rows` or `flat`
        does not apply `shifted` does, where no other does `plain`. By every one, values
        of a record that are not finite stay within its own gradient (but not where the
        result is differentiated again and convolutions are grouped: that is JAX's).

    Returns:
      A function of the same signature.

    Raises:
      UserError: for an unknown formulation.
    """
    if formulation not in FORMULATIONS:
        raise UserError(
            f"formulation is {formulation!r}: it must be one of"
            f" {', '.join(FORMULATIONS)}"
        )

    @functools.wraps(function)
    def rewritten(*args, **kwargs):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
        leaves = jax.tree.leaves((args, kwargs))
        outputs = _evaluate(closed, leaves, formulation)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return rewritten


# How a convolution of two batched operands is computed.


def _products(conv, shape, lhs, rhs, *, formulation: str) -> jax.Array:
    """Weight gradient of one record as matrix products over its pixels.

    Args:
      conv: the convolution, for its window and output layout.
      shape: of the output.
      lhs: images, to be laid out as [c, *space, n].
      rhs: output gradients, to be laid out as [c, *window, o].
      formulation: `rows`, `shifted` or `flat`.
    """
    numbers = conv["dimension_numbers"]
    n, c, *space = numbers.lhs_spec
    o, f, *window = numbers.rhs_spec
    images = jnp.transpose(lhs, (c, *space, n))
    gradients = jnp.transpose(rhs, (f, *window, o))
    taps = [shape[axis] for axis in numbers.out_spec[2:]]
    products = {"rows": _rows, "shifted": _shifted, "flat": _flat}[formulation]
    found = products(conv, taps, images, gradients)  # [*taps, n, o]
    last = found.ndim - 2
    order = [0] * found.ndim
    for position, axis in enumerate(numbers.out_spec):
        order[axis] = last + position if position < 2 else position - 2
    return jnp.transpose(found, order)


def _shifted(conv, taps: Sequence[int], images, gradients) -> jax.Array:
    """For each tap, the product of a shifted slice of the images with the gradients."""
    images = pad(images, conv["padding"])
    found = [
        _dot(conv, window(conv, images, tap, gradients.shape[1:-1]), gradients)
        for tap in itertools.product(*map(range, taps))
    ]
    return jnp.stack(found).reshape(*taps, *found[0].shape)


def _rows(conv, taps: Sequence[int], images, gradients) -> jax.Array:
    """For each row of taps one product, its taps side by side in one factor.

    To shift images by a column is to shift gradients back by one, so the gradients,
    shifted once for each tap of a row, make a factor wide enough to be multiplied fast,
    and images are moved for each row only.
    """
    *rows, row = taps
    *above, (low, _) = conv["padding"]
    step, width, used = conv["window_strides"][-1], images.shape[-2], gradients.shape
    shifts = [tap * step - low for tap in range(row)]
    kept = [(0, 0)] * len(above)
    groups = conv["batch_group_count"]
    wide = jnp.stack(  # [c, *window, groups, row, o of the group]
        [
            pad(gradients, [*kept, (shift, width - used[-2] - shift)]).reshape(
                *used[:-2], width, groups, -1
            )
            for shift in shifts
        ],
        axis=-2,
    ).reshape(*used[:-2], width, -1)
    images = pad(images, [*above, (0, 0)])
    found = [
        _dot(conv, window(conv, images, (*tap, 0), wide.shape[1:-1]), wide)
        for tap in itertools.product(*map(range, rows))
    ]
    products = jnp.stack(found).reshape(*rows, -1, groups, row, used[-1] // groups)
    return jnp.moveaxis(products, -2, len(rows)).reshape(*taps, -1, used[-1])


def _flat(conv, taps: Sequence[int], images, gradients) -> jax.Array:
    """For each tap a product of contiguous slices: no copies, some more pixels.

    With rows of images and gradients padded to one pitch a shift is an offset, and the
    gradients' zeros cancel what wraps.
    """
    images = pad(images, conv["padding"])
    pitch = images.shape[1:-1]
    spread = gradients.shape[1:-1]
    room = [(0, whole - used) for whole, used in zip(pitch, spread, strict=True)]
    gradients = pad(gradients, room).reshape(-1, gradients.shape[-1])
    images = images.reshape(-1, images.shape[-1])
    strides = [math.prod(pitch[axis + 1 :]) for axis in range(len(pitch))]
    found = []
    for tap in itertools.product(*map(range, taps)):
        offset = sum(i * stride for i, stride in zip(tap, strides, strict=True))
        piece = images[offset:]
        found.append(_dot(conv, piece, gradients[: piece.shape[0]]))
    return jnp.stack(found).reshape(*taps, *found[0].shape)


def pad(array: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
    """Pads the middle axes of [c, *space, n] with zeros; negative pads crop."""
    config = [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)]
    return lax.pad(array, jnp.zeros((), array.dtype), config)


def window(conv, images, tap: Sequence[int], spread: Sequence[int]) -> jax.Array:
    """Slices the pixels that a tap meets, for gradients of shape [c, *spread, o]."""
    start = [i * s for i, s in zip(tap, conv["window_strides"], strict=True)]
    stop = [
        first + (size - 1) * step + 1
        for first, size, step in zip(start, spread, conv["rhs_dilation"], strict=True)
    ]
    return lax.slice(
        images,
        (0, *start, 0),
        (images.shape[0], *stop, images.shape[-1]),
        (1, *conv["rhs_dilation"], 1),
    )


def _dot(conv, images: jax.Array, gradients: jax.Array) -> jax.Array:
    """[*l, n], [*l, o] -> [n, o], in `batch_group_count` blocks; sums in float32."""
    groups = conv["batch_group_count"]
    wide = max(images.dtype, jnp.dtype("float32"), key=lambda dtype: dtype.itemsize)
    if images.shape[-1] == gradients.shape[-1] == groups > 1:  # depthwise
        products = images.astype(wide) * gradients.astype(wide)
        return products.sum(tuple(range(products.ndim - 1)))[None]
    images = images.reshape(-1, groups, images.shape[-1] // groups)
    gradients = gradients.reshape(-1, groups, gradients.shape[-1] // groups)
    if groups == 1:
        images, gradients = images[:, 0], gradients[:, 0]
    found = lax.dot_general(
        images,
        gradients,
        (((0,), (0,)), ((1,), (1,)) if groups > 1 else ((), ())),
        precision=conv["precision"],
        preferred_element_type=wide,
    )
    if groups > 1:  # [groups, n, o] -> [n, groups * o]
        found = jnp.moveaxis(found, 0, 1).reshape(found.shape[1], -1)
    return found


def _apart(function: Callable[..., jax.Array], lhs, rhs) -> jax.Array:
    """Computes all records in one convolution without one spoiling the others.

    XLA may compute groups as one dense convolution with zeros between them, and zero
    times NaN is NaN. So records with values that are not finite are computed as zeros,
    and are NaN.
    """
    operands = (lhs, rhs)
    finite = [jnp.isfinite(x).all(range(1, x.ndim)) for x in operands]
    whole = functools.reduce(jnp.logical_and, finite)

    def choose(x, other):
        return jnp.where(
            whole.reshape(-1, *(1,) * (x.ndim - 1)), x, x.dtype.type(other)
        )

    return choose(function(*(choose(x, 0) for x in operands)), jnp.nan)


def _batch_group(conv, lhs, rhs) -> jax.Array:
    """All records in one convolution with `batch_group_count` for each record."""
    numbers = conv["dimension_numbers"]
    size = lhs.shape[0]
    n, o, out = numbers.lhs_spec[0], numbers.rhs_spec[0], numbers.out_spec[1]
    merged = lax.conv_general_dilated(
        _merge(lhs, n),
        _merge(rhs, o),
        **{**conv, "batch_group_count": conv["batch_group_count"] * size},
    )
    split = (*merged.shape[:out], size, -1, *merged.shape[out + 1 :])
    return jnp.moveaxis(merged.reshape(split), out, 0)


def _merge(array: jax.Array, axis: int) -> jax.Array:
    """Moves the leading record axis into another one, as its major part."""
    array = jnp.moveaxis(array, 0, axis)
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])


def _choose(conv, shape, formulation: str) -> str:
    """Picks the formulation for an output of this shape, `plain` where none applies."""
    numbers = conv["dimension_numbers"]
    taps = math.prod(shape[axis] for axis in numbers.out_spec[2:])
    undilated = all(dilation == 1 for dilation in conv["lhs_dilation"])
    if conv["feature_group_count"] > 1 or not undilated or taps > _MAX_TAPS:
        return "plain"
    if len(numbers.out_spec) == 2:  # a matrix product; it has no rows
        return "shifted"
    if formulation == "auto" and conv["batch_group_count"] > 1:
        if jax.default_backend() != "cpu":
            return "batch_group"
        images, gradients = (shape[axis] for axis in numbers.out_spec[:2])
        # Products of pixels are faster than XLA's groups, those of small matrices not.
        each = images * gradients // conv["batch_group_count"]
        return "shifted" if each == 1 else "plain"
    steps = {
        "auto": conv["rhs_dilation"][-1:],
        "rows": conv["rhs_dilation"][-1:],
        "flat": (*conv["window_strides"], *conv["rhs_dilation"]),
    }
    if any(step > 1 for step in steps.get(formulation, ())):
        return "shifted"
    return "rows" if formulation == "auto" else formulation


def _with_fast_batching(conv: dict[str, Any], formulation: str):
    """Returns the convolution as a function (lhs, rhs) with our batching rule."""
    plain: Callable[..., Any] = functools.partial(lax.conv_general_dilated, **conv)

    @jax.custom_jvp  # around the other, which has no reverse mode
    def differentiable(lhs, rhs):
        return convolution(lhs, rhs)

    @differentiable.defjvp
    def derivative(primals, tangents):
        (lhs, rhs), (lhs_tangent, rhs_tangent) = primals, tangents
        tangent = plain(lhs_tangent, rhs) + plain(lhs, rhs_tangent)
        return differentiable(lhs, rhs), tangent

    @jax.custom_batching.custom_vmap
    def convolution(lhs, rhs):
        return plain(lhs, rhs)

    @convolution.def_vmap
    def rule(axis_size, in_batched, lhs, rhs):
        axes = [0 if batched else None for batched in in_batched]
        if not all(in_batched):
            return jax.vmap(plain, axes, axis_size=axis_size)(lhs, rhs), True
        return _batched(conv, formulation, lhs, rhs), True

    return differentiable


def _batched(conv, formulation: str, lhs, rhs) -> jax.Array:
    """One convolution for each record, both operands being the record's own."""
    plain: Callable[..., Any] = functools.partial(lax.conv_general_dilated, **conv)
    one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (lhs, rhs)]
    result = jax.eval_shape(plain, *one)
    chosen = _choose(conv, result.shape, formulation)
    if chosen == "plain":
        return _apart(jax.vmap(plain), lhs, rhs)
    if chosen == "batch_group":
        return _apart(functools.partial(_batch_group, conv), lhs, rhs)
    record = functools.partial(_products, conv, result.shape, formulation=chosen)
    if jax.default_backend() == "cpu":  # its batched products are slow, loops not
        out = lax.map(lambda pair: record(*pair), (lhs, rhs))
    else:
        out = jax.vmap(record)(lhs, rhs)
    return out.astype(result.dtype)


# All that is needed of JAX's extension points is below.


def _evaluate(closed: core.ClosedJaxpr, args: Sequence[Any], formulation: str):
    """Evaluates a jaxpr with its convolutions replaced."""
    try:
        return _interpret(closed.jaxpr, closed.consts, args, formulation)
    except (AttributeError, TypeError, NotImplementedError, KeyError) as error:
        if _has_convolution(closed.jaxpr, grouped=True):  # see `_apart`
            raise UserError(
                f"jax {jax.__version__} does not let us replace convolutions, and its"
                " own rule lets records that are NaN spoil others in grouped ones:"
                f" {type(error).__name__}: {error}"
            ) from None
        warnings.warn(
            f"jax {jax.__version__} does not let us replace its convolutions, so that"
            f" per-record gradients are slow: {type(error).__name__}: {error}",
            stacklevel=3,
        )
        return core.jaxpr_as_fun(closed)(*args)


def _interpret(jaxpr: core.Jaxpr, consts, args, formulation: str) -> list[Any]:
    values: dict[core.Var, Any] = {}
    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        if equation.primitive.name == "conv_general_dilated":
            params = dict(equation.params)
            if params.get("out_sharding") is None:
                params.pop("out_sharding", None)
            outputs = [_with_fast_batching(params, formulation)(*inputs)]
        else:
            params = {
                name: _rewrite(value, formulation)
                for name, value in equation.params.items()
            }
            outputs = list(bind(equation, inputs, params))
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def bind(equation, inputs: Sequence[Any], params: dict[str, Any]) -> Sequence[Any]:
    """Evaluates an equation of a jaxpr with these inputs and parameters."""
    params = equation.primitive.get_bind_params(params)
    with equation.ctx.manager:
        found = equation.primitive.bind(*inputs, **params)
    return found if equation.primitive.multiple_results else [found]


def _rewrite(param: Any, formulation: str) -> Any:
    """Rewrites the jaxprs in a parameter of an equation, if they hold a convolution."""
    if type(param) in (tuple, list):
        return type(param)(_rewrite(item, formulation) for item in param)
    # jax 0.11 has one class for both, so that what is closed comes first.
    if not isinstance(param, core.ClosedJaxpr):
        if not isinstance(param, core.Jaxpr) or param.constvars:
            return param
        closed = _rewrite(core.ClosedJaxpr(param, ()), formulation)
        return param if closed.consts else closed.jaxpr
    if not _has_convolution(param.jaxpr):
        return param
    shapes = [var.aval for var in param.jaxpr.invars]
    return jax.make_jaxpr(
        lambda *args: _interpret(param.jaxpr, param.consts, args, formulation)
    )(*shapes)


def _has_convolution(jaxpr: core.Jaxpr, *, grouped: bool = False) -> bool:
    def found(equation) -> bool:
        if equation.primitive.name == "conv_general_dilated":
            counts = ("feature_group_count", "batch_group_count")
            return not grouped or any(equation.params[name] > 1 for name in counts)
        inner = inner_jaxprs(equation.params)
        return any(_has_convolution(jaxpr, grouped=grouped) for jaxpr in inner)

    return any(map(found, jaxpr.eqns))


def inner_jaxprs(params: dict[str, Any]):
    """Yields the jaxprs among the parameters of an equation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
