"""The clipped sum of per-record gradients without the per-record gradients.

The gradient of a matrix is a product, over T positions (images, tokens, pixels), of
what went into the layer, a_t, and the gradient of what came out, g_t. Its squared norm,

    || sum_t a_t g_t^T ||^2 = sum_{t,t'} (a_t . a_t') (g_t . g_t'),

takes T^2 inner products and never the matrix: the ghost norm (Li et al., 2022). So a
first pass finds norms, and a second one the gradient of the weighted sum of losses,
which is as large as a plain gradient. Where T is large the matrix is the cheaper of
the two, and is formed for its norm only: mixed ghost clipping (Bu et al., 2022).

As in `conv`, the traced gradient is rewritten, not the model: whatever output of it is
a product, up to its layout, is the gradient of a matrix used once. Everything else
(shared, standardised or embedded weights, scales and biases) is formed for its norm.
"""

import collections
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax_privacy import clipping

from dpmix_jax import conv
from dpmix_jax.errors import UserError
from dpmix_jax.gradients import check_clip_norm, sum_of_no_records

PyTree = Any
Source = tuple[Any, int]  # an equation, and which of its outputs

# Of (sum_t |a_t| |g_t|)^2, by which rounding may move the sum over t, t': four times
# what was seen, with and without cancellation, at up to 2,000 positions.
_ROUNDING = 2.0**-21

_CALLS = ("jit", "pjit")
_BODIES = ("checkpoint", "remat2", "scan")
_LAYOUT = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "rev", "copy")


def ghost_clipped_gradient(
    loss_fn: Callable[..., jax.Array],
    *,
    l2_clip_norm: float,
    convolutions: str = "auto",
) -> clipping.BoundedSensitivityCallable:
    """`gradients.clipped_gradient` in the memory of a plain gradient, in two passes.

    Mixed ghost clipping (Bu et al., 2022, "Scalable and efficient training of large
    convolutional neural networks with differential privacy"): norms first, then the
    gradient of the losses weighted by min(1, C / norm). Saves memory where matrices
    are large and positions few, see `cheaper_as_ghost`; costs a second pass.

    Formal guarantees:
      - Record i's term depends on record i, the parameters and `constants` alone.
      - Every record's term has L2 norm at most `l2_clip_norm`, up to the float32
        rounding of a forward and backward pass, for the norm and the term come from two
        of them. Adding or removing a record moves the sum by at most
        `.sensitivity(ADD_OR_REMOVE_ONE)`, and replacing one by at most
        `.sensitivity(REPLACE_ONE)`, twice as much.
      - This holds for records that are NaN, infinite or huge: one whose loss or norm
        is not finite contributes exactly 0, and changes nothing for the others.
      - Padding contributes exactly 0.
      - The sum is formed in float32, and so is all that leads to it: narrower floats
        are refused.
      - No ghost norm is below the norm of the product of its layer's factors by more
        than float32 rounding of a sum of squares, however much cancels in it: it is
        raised by what rounding can hide, 4.8e-7 (sum_t |a_t| |g_t|)^2 in squares. (By a
        share of 2.4e-7 T for T factors of one length that are at right angles; records
        in which terms a thousand times as long cancel are clipped too much.)
    The second output, per-record losses and gradient norms before the clip, is not
    private.

    The default, `gradients.clipped_gradient`, clips the very numbers it has measured,
    so its bound does not rest on two passes that round alike. How far these differ is a
    matter of the model: where it amplifies rounding without bound (normalisation with
    an epsilon of 1e-12 of an image of one colour, before a kink) the bound is gone;
    with those of the models here terms were seen at 1.000004 C at most.

    `jax.custom_vjp` is refused: its backward rule need not be linear, so that a
    weighted loss need not have the weighted gradient.

    Args:
      loss_fn: `loss_fn(params, *record) -> scalar` of one record, in any library. Its
        products are computed in float32 unless it says otherwise.
      l2_clip_norm: C, in [1e-10, 1e10].
      convolutions: how per-record gradients of convolutions are computed where they
        are, see `conv.fast_convolutions`.

    Returns:
      A function of the signature of `clipped_gradient`'s.

    Raises:
      UserError: if `l2_clip_norm` is out of that range, and when called with a loss
        that computes in less than float32 or has a `custom_vjp`.
    """
    check_clip_norm(l2_clip_norm)

    @jax.default_matmul_precision("float32")
    def sum_of_clipped_gradients(
        params: PyTree,
        *records: PyTree,
        is_padding_example: jax.Array | None = None,
        constants: Sequence[PyTree] = (),
    ):
        size = jax.tree.leaves(records)[0].shape[0]
        if size == 0:
            return sum_of_no_records(params)

        def loss(params, *record):
            return loss_fn(params, *record, *constants)

        measure = conv.fast_convolutions(
            _value_and_norm(loss), formulation=convolutions
        )
        axes = (None, *(0 for _ in records))
        values, norms = jax.vmap(measure, axes)(params, *records)
        usable = jnp.isfinite(values) & jnp.isfinite(norms)
        if is_padding_example is not None:
            usable &= ~is_padding_example
        weights = jnp.minimum(1.0, l2_clip_norm / jnp.maximum(norms, 1e-30))
        weights = jnp.where(usable, weights, 0.0)
        records = _with_stand_ins(records, usable)
        losses, pullback = jax.vjp(
            lambda params: jax.vmap(loss, axes)(params, *records), params
        )
        (total,) = pullback(weights.astype(losses.dtype))

        def finite(leaf):
            valid = jnp.isfinite(leaf) & usable.any()
            return jnp.where(valid, leaf, 0.0).astype(jnp.float32)

        aux = clipping.AuxiliaryOutput(values, norms, None)
        return jax.tree.map(finite, total), aux

    return clipping.BoundedSensitivityCallable(
        sum_of_clipped_gradients, l2_clip_norm, has_aux=True
    )


def cheaper_as_ghost(positions: int, inputs: int, outputs: int) -> bool:
    """Whether T^2 inner products on both sides take no more room than the matrix.

    The rule of Bu et al. (2022), 2 T^2 <= p d.

    Args:
      positions: T, of all K set members.
      inputs: d, for a convolution channels times taps.
      outputs: p.
    """
    return 2 * positions**2 <= outputs * inputs


def _with_stand_ins(records: PyTree, usable: jax.Array) -> PyTree:
    """Puts a usable record in the place of each that is not.

    Its weight is 0, and so is its term, since 0 times what is finite is 0. Zeros would
    not do: a model may be NaN there, and 0 times NaN is NaN.
    """
    first = jnp.argmax(usable)

    def replace(leaf):
        chosen = usable.reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.where(chosen, leaf, leaf[first][None])

    return jax.tree.map(replace, records)


def _value_and_norm(loss_fn: Callable[..., jax.Array]):
    """Returns `f(params, *record) -> (loss, norm of its gradient)`."""

    def value_and_norm(params, *record):
        _refuse_custom_vjp(jax.make_jaxpr(loss_fn)(params, *record).jaxpr)
        closed = jax.make_jaxpr(jax.value_and_grad(loss_fn))(params, *record)
        _check_width(closed.jaxpr)
        args = jax.tree.leaves((params, record))
        value, *squares = _evaluate(closed, args)
        return value, jnp.sqrt(sum(squares, start=jnp.float32(0)))

    return value_and_norm


def _refuse_custom_vjp(jaxpr: core.Jaxpr) -> None:
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("custom_vjp"):
            raise UserError(
                "the loss has a custom_vjp, whose rule need not be linear: ghost"
                " clipping needs gradients by JAX's own rules or custom_jvp"
            )
        for inner in conv.inner_jaxprs(equation.params):
            _refuse_custom_vjp(inner)


def _check_width(jaxpr: core.Jaxpr) -> None:
    """Raises `UserError` for floats narrower than float32 anywhere."""
    for var in (*jaxpr.invars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)):
        dtype = getattr(var.aval, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            continue
        if dtype.itemsize < 4:
            raise UserError(
                f"the loss computes in {dtype}: ghost clipping needs float32, for its"
                " two passes to round alike"
            )
    for equation in jaxpr.eqns:
        for inner in conv.inner_jaxprs(equation.params):
            _check_width(inner)


# The squared norm of a product by its factors.


def _squared_norm(pieces: Sequence[jax.Array], gradients: jax.Array) -> jax.Array:
    """Squared norm of sum_t a_t g_t^T, raised by what rounding may hide.

    Factors are balanced first, s_t a_t and g_t / s_t, so that no square vanishes or
    overflows where the product does not.

    Args:
      pieces: a, [*b, T, n] for each tap; the squares of all b are summed.
      gradients: g, [*b, T, p].

    Returns:
      A scalar; NaN if any factor is not finite, even against zeros.
    """
    sizes = [jnp.abs(piece).max(-1, initial=0.0) for piece in pieces]
    a, g = functools.reduce(jnp.maximum, sizes), jnp.abs(gradients).max(-1, initial=0.0)
    both = (a > 0) & (g > 0)
    a, g = jnp.sqrt(a), jnp.sqrt(g)
    pieces = [piece * jnp.where(both, g / a, 0.0)[..., None] for piece in pieces]
    gradients = gradients * jnp.where(both, a / g, 0.0)[..., None]
    products = sum(map(_gram, pieces)) * _gram(gradients)
    squares = sum(jnp.square(piece).sum(-1) for piece in pieces)
    lengths = jnp.sqrt(squares) * jnp.sqrt(jnp.square(gradients).sum(-1))
    hidden = _ROUNDING * jnp.square(lengths.sum(-1))
    return (jnp.maximum(products.sum((-2, -1)), 0.0) + hidden).sum()


def _gram(rows: jax.Array) -> jax.Array:
    """[*b, T, n] -> [*b, T, T]."""
    return jnp.matmul(rows, jnp.swapaxes(rows, -2, -1), precision="float32")


def _factors(equation, lhs, rhs) -> tuple[list[jax.Array], jax.Array]:
    """Lays the operands of a product out as `_squared_norm` takes them."""
    if equation.primitive.name == "dot_general":
        (contracted, batch) = equation.params["dimension_numbers"]
        return (
            [_laid_out(lhs, batch[0], contracted[0])],
            _laid_out(rhs, batch[1], contracted[1]),
        )
    params = equation.params
    numbers = params["dimension_numbers"]
    n, c, *space = numbers.lhs_spec
    o, f, *window = numbers.rhs_spec
    images = conv.pad(jnp.transpose(lhs, (c, *space, n)), params["padding"])
    gradients = jnp.transpose(rhs, (f, *window, o))
    shape = equation.outvars[0].aval.shape
    taps = [range(shape[axis]) for axis in numbers.out_spec[2:]]
    spread = gradients.shape[1:-1]
    pieces = [
        conv.window(params, images, tap, spread).reshape(-1, images.shape[-1])
        for tap in itertools.product(*taps)
    ]
    return pieces, gradients.reshape(-1, gradients.shape[-1])


def _laid_out(operand: jax.Array, batch, contracted) -> jax.Array:
    """Transposes the operand of a product to [b, T, n]."""
    free = [i for i in range(operand.ndim) if i not in (*batch, *contracted)]
    sizes = [math.prod(operand.shape[i] for i in axes) for axes in (batch, contracted)]
    return jnp.transpose(operand, (*batch, *contracted, *free)).reshape(*sizes, -1)


def _has_ghost_norm(equation) -> bool:
    """Whether an equation is a product whose norm its factors give more cheaply."""
    params, name = equation.params, equation.primitive.name
    if name not in ("dot_general", "conv_general_dilated"):
        return False
    lhs, rhs = (atom.aval for atom in equation.invars)
    if not lhs.dtype == rhs.dtype == equation.outvars[0].aval.dtype == jnp.float32:
        return False
    if name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        each = math.prod(lhs.shape[i] for i in batch)
        positions = math.prod(lhs.shape[i] for i in contracted)
        sizes = [x.size // max(each * positions, 1) for x in (lhs, rhs)]
        return cheaper_as_ghost(positions, *sizes)
    plain = params["feature_group_count"] == params["batch_group_count"] == 1
    if not plain or any(dilation > 1 for dilation in params["lhs_dilation"]):
        return False
    o, *positions = (rhs.shape[axis] for axis in params["dimension_numbers"].rhs_spec)
    inputs = equation.outvars[0].aval.size // max(o, 1)
    return cheaper_as_ghost(math.prod(positions), inputs, o)


# The rewrite of a traced gradient.


def _evaluate(closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[jax.Array]:
    """Evaluates the value and the squared norm of each other output."""
    norms = range(1, len(closed.jaxpr.outvars))
    try:
        return _interpret(closed, args, norms)
    except (AttributeError, TypeError, NotImplementedError, KeyError) as error:
        warnings.warn(
            f"jax {jax.__version__} does not let us find ghost norms, so that every"
            f" per-record gradient is formed: {type(error).__name__}: {error}",
            stacklevel=3,
        )
        value, *gradients = core.jaxpr_as_fun(closed)(*args)
        return [value, *map(_sum_of_squares, gradients)]


def _interpret(
    closed: core.ClosedJaxpr, args: Sequence[Any], norms: Collection[int]
) -> list[jax.Array]:
    """Evaluates a jaxpr, and squared norms in place of the outputs at `norms`.

    What then nobody needs is not evaluated.
    """
    avals = [var.aval for var in closed.jaxpr.invars]
    closed = jax.make_jaxpr(functools.partial(_inlined, closed))(*avals)
    jaxpr = closed.jaxpr
    values: dict[core.Var, Any] = {}
    values.update(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return values[atom] if _is_variable(atom) else atom.val

    sources: dict[int, Source | None] = {k: _source(jaxpr, k) for k in norms}
    inside: dict[int, set[int]] = collections.defaultdict(set)
    wanted = [var for k, var in enumerate(jaxpr.outvars) if sources.get(k) is None]
    for equation, position in [s for s in sources.values() if s is not None]:
        if equation.primitive.name in _BODIES:
            inside[id(equation)].add(position)
            wanted.append(equation.outvars[position])
        else:
            wanted.extend(equation.invars)
    for equation in _needed(jaxpr, wanted):
        inputs = [read(atom) for atom in equation.invars]
        params = dict(equation.params)
        if id(equation) in inside:
            params["jaxpr"] = _body(params["jaxpr"], inside[id(equation)])
        outputs = conv.bind(equation, inputs, params)
        values.update(zip(equation.outvars, outputs, strict=True))

    def output(k):
        source = sources.get(k)
        if source is None:
            value = read(jaxpr.outvars[k])
            return _sum_of_squares(value) if k in sources else value
        equation, position = source
        if equation.primitive.name in _BODIES:  # of a scan one for each round
            return jnp.sum(read(equation.outvars[position]))
        return _squared_norm(*_factors(equation, *map(read, equation.invars)))

    return [output(k) for k in range(len(jaxpr.outvars))]


def _source(jaxpr: core.Jaxpr, k: int) -> Source | None:
    """Finds the equation that makes the numbers of output k, and which of its outputs.

    Returns:
      A product with a ghost norm, or an equation with a body in which to look on; None
      for anything else.
    """
    producers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    atoms = (*jaxpr.outvars, *(a for e in jaxpr.eqns for a in e.invars))
    uses = collections.Counter(filter(_is_variable, atoms))
    var: Any = jaxpr.outvars[k]
    alone = True
    while _is_variable(var) and var in producers:
        equation, alone = producers[var], alone and uses[var] == 1
        name, position = equation.primitive.name, equation.outvars.index(var)
        if _has_ghost_norm(equation):
            return equation, position
        if name in _BODIES:
            carried = equation.params.get("num_carry", 0)  # what scan adds up
            return (equation, position) if alone and position >= carried else None
        source: Any = equation.invars[0] if name in _LAYOUT else None
        if source is None or source.aval.size != var.aval.size:
            return None
        var = source
    return None


def _needed(jaxpr: core.Jaxpr, wanted: Iterable[Any]) -> list[Any]:
    """Returns the equations that these variables need, in their order."""
    needed, kept = set(filter(_is_variable, wanted)), []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            needed.update(filter(_is_variable, equation.invars))
            kept.append(equation)
    return kept[::-1]


def _is_variable(atom: Any) -> bool:
    return isinstance(atom, core.Var)


def _body(jaxpr: Any, norms: Collection[int]) -> Any:
    """Returns the body of an equation with squared norms in place of these outputs."""
    is_closed = isinstance(jaxpr, core.ClosedJaxpr)
    closed = jaxpr if is_closed else core.ClosedJaxpr(jaxpr, ())
    avals = [var.aval for var in closed.jaxpr.invars]
    found = jax.make_jaxpr(lambda *args: _interpret(closed, args, norms))(*avals)
    if is_closed:
        return found
    if found.consts:
        raise NotImplementedError("a body without room for its constants")
    return found.jaxpr


def _inlined(closed: core.ClosedJaxpr, *args: Any) -> list[Any]:
    """Evaluates a jaxpr with what `jit` calls in it spelt out."""
    values: dict[core.Var, Any] = {}
    values.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(closed.jaxpr.invars, args, strict=True))

    def read(atom):
        return values[atom] if _is_variable(atom) else atom.val

    for equation in closed.jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        outputs: Sequence[Any]
        if equation.primitive.name in _CALLS:
            outputs = _inlined(equation.params["jaxpr"], *inputs)
        else:
            outputs = conv.bind(equation, inputs, dict(equation.params))
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _sum_of_squares(array: jax.Array) -> jax.Array:
    return jnp.square(array.astype(jnp.float32)).sum()
