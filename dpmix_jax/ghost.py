"""The clipped sum of per-record gradients, from their factors where these are smaller.

The gradient of a matrix is a sum of products a_t g_t^T over T positions (images,
tokens, pixels): a_t is the input of the layer, g_t the gradient of its output.
The squared norm of the sum,

    || sum_t a_t g_t^T ||^2 = sum_{t,t'} (a_t . a_t') (g_t . g_t'),

takes T^2 inner products and never the matrix: the ghost norm (Li et al., 2022). The sum
of such matrices over records, each times its clip factor, is one more product of the
same rows: book-keeping (Bu et al., 2023). So where T is small, the rows a_t and g_t of
a record are kept in place of its matrix until its clip factor is known.

As in `conv`, the traced gradient is rewritten, not the model. An output of the traced
gradient that is a product, up to its layout, is the gradient of a matrix used once.
Every other gradient (of shared, standardised or embedded weights, scales and biases) is
formed.
"""

import collections
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax_privacy import clipping

from dpmix_jax import conv
from dpmix_jax.gradients import Weight, check_clip_norm, clip, sum_of_no_records

PyTree = Any

# At most so many rows in a block of records: many are faster, few round less. On a CPU
# about so many numbers, which stay in its cache from their norms to their sum.
_ROWS = 2048
_NUMBERS_ON_CPU = 2**20

# Up to so many rows, their inner products are faster one by one than as a matrix.
_FEW_ROWS = 3

# Beside a longer row small numbers might underflow in float32 after the clip.
_LONGEST_ROW = 1e12

_CALLS = ("jit", "pjit")
_BODIES = ("checkpoint", "remat2", "scan")
_LAYOUT = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "rev", "copy")


def cheaper_as_factors(positions: int, inputs: int, outputs: int) -> bool:
    """Whether T rows on both sides take no more room than the matrix: T (d + p) <= d p.

    Their T^2 inner products take no more either, for then 4 T^2 <= d p.

    Args:
      positions: T, of all K set members.
      inputs: d, for a convolution channels times taps.
      outputs: p.
    """
    return 0 < positions * (inputs + outputs) <= inputs * outputs


def always(positions: int, inputs: int, outputs: int) -> bool:
    """Keeps all factors: for a linear head, whose rows already exist as embeddings."""
    return True


def ghost_clipped_gradient(
    loss_fn: Callable[..., jax.Array],
    *,
    l2_clip_norm: float,
    weight: Weight = clip,
    convolutions: conv.Formulation = "auto",
    keep: Callable[[int, int, int], bool] = cheaper_as_factors,
) -> clipping.BoundedSensitivityCallable:
    """`gradients.clipped_gradient` that keeps small factors instead of large matrices.

    Mixed ghost clipping with book-keeping (Bu et al., 2023, "Differentially private
    optimization on large foundation models at low cost"): one backward pass finds the
    factors of every record's gradient. The factors give the gradient's norm, the norm
    gives its weight, and weight and factors give the record's term. This saves memory
    and time where matrices are large and positions few, see `cheaper_as_factors`.
    Elsewhere the gradient of every record is formed, as `clipped_gradient` does.

    Formal guarantees:
      - Record i's term depends on record i, the parameters and `constants` alone.
      - Every record's term has L2 norm at most `l2_clip_norm`, with all that float32
        rounding does to the term on its way into this sum. So adding or removing a
        record moves the sum by at most `.sensitivity(ADD_OR_REMOVE_ONE)`, and replacing
        one by at most `.sensitivity(REPLACE_ONE)`, twice as much, up to how the terms
        of the other records round beside it.
      - This holds for records that are NaN, infinite or huge: one whose loss or norm
        is not finite, that has a factor with a row longer than 1e12, or whose norm is
        1e38 times C, contributes exactly 0, and changes nothing for the others.
      - Padding contributes exactly 0.
      - The sum is formed in float32, whatever the loss computes in.
      - The norm that decides the clip is never below that of the term, however much
        cancels in it and in whatever order a processor adds up: inner products are
        float64, and what rounding can do to the sum is added, see
        `_norms_of_products`. This is at most `6e-8 m sum_t |a_t| |g_t|`, where m is
        about the larger of T and 2048, and the number of blocks: of the norm a share of
        1.3e-5 at most in the models of the tests and in stacks of up to 2000 positions,
        and 0.5 % where 2000 rows are at right angles. Records in which terms a thousand
        times as long cancel are clipped too much.
    All of this takes IEEE float32 products, which TPUs do not have. The second output,
    per-record losses and the norms that are clipped by, is not private.

    Args:
      loss_fn: `loss_fn(params, *record) -> scalar` of one record, in any library. Its
        products are computed in float32 unless it says otherwise.
      l2_clip_norm: C, in [1e-10, 1e10].
      weight: `f(norm, C)` returns the factor of a gradient, such as
        `gradients.automatic`; a factor above C / norm is lowered to C / norm.
      convolutions: how per-record gradients of convolutions are computed where no
        factors are kept, see `conv.fast_convolutions`.
      keep: `f(T, d, p)`, whether the factors of a matrix used once are kept:
        `cheaper_as_factors`, or `always`.

    Returns:
      A function of the signature of `clipped_gradient`'s.

    Raises:
      UserError: if `l2_clip_norm` is out of that range.

    Example:
      >>> gradient_fn = dpm.ghost_clipped_gradient(
      ...     lambda w, x: (x @ w).sum(), l2_clip_norm=1.0, keep=dpm.ghost.always
      ... )
      >>> gradient_fn.sensitivity(dpm.NeighboringRelation.REPLACE_ONE)
      2.0
    """
    l2_clip_norm = check_clip_norm(l2_clip_norm)

    def of_norm(norm: jax.Array) -> jax.Array:
        longest = l2_clip_norm / jnp.maximum(norm, 1e-30)
        return jnp.minimum(weight(norm, l2_clip_norm), longest)

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
        sources: list[_Source] = []

        def value_and_kept(params, *record):
            args = (params, *record, *constants)
            closed = jax.make_jaxpr(jax.value_and_grad(loss_fn))(*args)
            outputs, sources[:] = _rewritten(closed, keep)
            return outputs(*jax.tree.leaves(args))

        of_one = conv.fast_convolutions(value_and_kept, formulation=convolutions)
        axes = (None, *(0 for _ in records))
        values, *kept = jax.vmap(of_one, axes)(params, *records)
        usable = jnp.isfinite(values)
        if is_padding_example is not None:
            usable &= ~is_padding_example
        sums, norms = _clipped_sums(of_norm, usable, kept, sources)
        total = jax.tree.unflatten(jax.tree.structure(params), sums)
        return total, clipping.AuxiliaryOutput(values, norms, None)

    return clipping.BoundedSensitivityCallable(
        sum_of_clipped_gradients, l2_clip_norm, has_aux=True
    )


class _Source(NamedTuple):
    """How an output of the traced gradient comes about; by default it is formed.

    Attributes:
      equation: a product, an equation whose body has a product, or the broadcast of a
        0.
      position: which of the equation's outputs it is.
      inner: the source in the body.
      inputs: d, if rows a [*b, T, d] and g [*b, T, p] are kept; 0 if not.
      finish: makes the output of the sum of products, see `_order`, or of the kept 0.
    """

    equation: Any = None
    position: int = 0
    inner: "_Source | None" = None
    inputs: int = 0
    finish: Callable[[jax.Array], jax.Array] = lambda total: total


# From what is kept of every record to norms and the clipped sum.


def _clipped_sums(
    weight: Callable[[jax.Array], jax.Array],
    usable: jax.Array,
    kept: Sequence[PyTree],
    sources: Sequence[_Source],
) -> tuple[list[jax.Array], jax.Array]:
    """Clips every record by the norm of all that is kept of it, and adds up.

    The loop over blocks of records has two rounds at least, so that norms and sums read
    the same numbers from memory: outside a loop XLA may compute a number once for each
    of its uses, and round it in two ways.

    Args:
      weight: of a record, by its norm.
      usable: [B] bool, which records may count.
      kept: for each output what is kept of all records, [B, ...] or two such.
      sources: of the outputs.

    Returns:
      For each output its sum, and the records' norms [B].
    """
    size = len(usable)
    if size == 1:
        usable, kept = jax.tree.map(
            lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), (usable, kept)
        )
    on = [
        functools.partial(
            _sums_of_blocks, weight, sources, _records_at_once(kept, sources, on_cpu)
        )
        for on_cpu in (True, False)
    ]
    sums, norms = jax.lax.platform_dependent(usable, kept, cpu=on[0], default=on[1])
    return sums, norms[:size]


def _sums_of_blocks(
    weight: Callable[[jax.Array], jax.Array],
    sources: Sequence[_Source],
    together: int,
    usable: jax.Array,
    kept: Sequence[PyTree],
) -> tuple[list[jax.Array], jax.Array]:
    """`_clipped_sums` of two records or more, in blocks of `together` of them."""
    rounds = -(-len(usable) // together)
    last = len(usable) - together

    def clipped(counts, kept):
        with jax.enable_x64(True):
            norms = [_norms(x, s, rounds) for x, s in zip(kept, sources, strict=True)]
            norm = jnp.sqrt(sum(map(jnp.square, norms))).astype(jnp.float32)
        weights = weight(norm)
        # A subnormal weight would be rounded by more than the bounds allow for.
        counts = counts & jnp.isfinite(norm) & (weights >= 2.0**-126)
        weights = jnp.where(counts, weights, 0.0)
        each = zip(kept, sources, strict=True)
        return [_weighted_sum(weights, x, source) for x, source in each], norm

    def block(start):
        """Returns a block; the last has records of the one before, masked."""
        first = jnp.minimum(start, last)
        part, *kept_of_block = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, together), (usable, *kept)
        )
        return part & (first + jnp.arange(together) >= start), kept_of_block

    def add(totals, start):
        sums, norms = clipped(*block(start))
        return jax.tree.map(jnp.add, totals, sums), norms

    shapes, _ = jax.eval_shape(lambda: clipped(*block(0)))
    zeros = [jnp.zeros(x.shape, x.dtype) for x in shapes]
    starts = together * jnp.arange(rounds)
    totals, norms = jax.lax.scan(add, zeros, starts)
    sums = [s.finish(total) for s, total in zip(sources, totals, strict=True)]
    new = len(usable) - together * (rounds - 1)
    return sums, jnp.concatenate([norms[:-1].reshape(-1), norms[-1, together - new :]])


def _records_at_once(
    kept: Sequence[PyTree], sources: Sequence[_Source], on_cpu: bool
) -> int:
    """Returns how many records a block has: at most half of them."""
    records = len(jax.tree.leaves(kept)[0])
    rows = [x[0].shape[-2] for x, s in zip(kept, sources, strict=True) if s.inputs]
    limit = _ROWS // max(rows, default=1)
    if on_cpu:
        numbers = max(x.size // records for x in jax.tree.leaves(kept))
        limit = min(limit, max(16, _NUMBERS_ON_CPU // max(numbers, 1)))
    return max(1, min(records // 2, limit))


def _norms(kept: PyTree, source: _Source, rounds: int) -> jax.Array:
    """Returns bounds of r records' gradient norms, rounding included: float64 [r]."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), kept)
    if not source.inputs:
        norms = jnp.sqrt(jnp.square(wide).sum(range(1, wide.ndim)))
        return norms * (1 + _rounding(len(wide) + rounds))
    a, g = wide
    norms, short = _norms_of_products(a, g, len(a) * a.shape[-2] + rounds)
    norms = jnp.where(short, norms, jnp.inf)
    return jnp.sqrt(jnp.square(norms).sum(range(1, norms.ndim)))


def _norms_of_products(
    a: jax.Array, g: jax.Array, rounded: int
) -> tuple[jax.Array, jax.Array]:
    """Bounds the norms of sum_t a_t g_t^T, and of any float32 rounding of such sums.

    A sum of n products, in any order, is the exact sum of products each changed by a
    share of at most gamma_n = n u / (1 - n u), u = 2^-24 in float32 and 2^-53 in
    float64 (Higham, 2002, Section 3.1). So where rows of several records are added up
    in float32, n addends in all, a record's part is off by at most gamma_n L,
    L = sum_t |a_t| |g_t|. And the double sum over inner products, in float64, is off by
    gamma_(d + p + T^2) L^2.

    Args:
      a: [*b, T, d] float64.
      g: [*b, T, p] float64.
      rounded: n.

    Returns:
      Norms, [*b] float64, and whether all rows are finite and at most `_LONGEST_ROW`
      long, [*b] bool.
    """
    (*_, t, d), p = a.shape, g.shape[-1]
    inner = [_inner_products(x) for x in (a, g)]
    squares = [jnp.diagonal(x, axis1=-2, axis2=-1) for x in inner]
    short = jnp.logical_and(*(x <= _LONGEST_ROW**2 for x in squares)).all(-1)
    lengths = jnp.sqrt(squares[0] * squares[1]).sum(-1)
    hidden = _rounding(d + p + t * t, 2.0**-53) * jnp.square(lengths)
    total = (inner[0] * inner[1]).sum((-2, -1))
    norms = jnp.sqrt(jnp.maximum(total, 0.0) + hidden)
    return norms + _rounding(rounded) * lengths, short


def _inner_products(rows: jax.Array) -> jax.Array:
    """Returns [*b, T, T], of all pairs of rows [*b, T, n]."""
    if rows.shape[-2] > _FEW_ROWS:
        return rows @ rows.mT
    return (rows[..., :, None, :] * rows[..., None, :, :]).sum(-1)


def _rounding(n: int, unit: float = 2.0**-24) -> float:
    """gamma_n, with 8 more for what rounds before and after: weights, norms, roots."""
    return (n + 8) * unit / (1 - (n + 8) * unit)


def _weighted_sum(weights: jax.Array, kept: PyTree, source: _Source) -> jax.Array:
    """Sums r records' gradients, each times its weight [r], in float32."""

    def of_counted(x):
        counted = weights.reshape(-1, *(1,) * (x.ndim - 1)) > 0
        return jnp.where(counted, x, x.dtype.type(0))  # 0 times NaN is NaN

    *a, g = jax.tree.leaves(jax.tree.map(of_counted, kept))
    if not source.inputs:
        flat = g.astype(jnp.float32).reshape(len(g), -1)
        total = jnp.einsum("r,rn->n", weights, flat, precision="float32")
        return total.reshape(g.shape[1:])
    weighted = weights.reshape(-1, *(1,) * (g.ndim - 1)) * g.astype(jnp.float32)
    order = _order(source.inputs, g.shape[-1])
    products = f"r...td,r...tp->...{order}"
    return jnp.einsum(products, *a, weighted, precision="float32")


def _order(inputs: int, outputs: int) -> str:
    """How sums of products d x p are laid out: with the longer side last, for speed."""
    return "pd" if inputs > outputs else "dp"


# What a product is made of.


def _sizes(equation) -> tuple[int, int, int] | None:
    """Returns T, d and p of a product in float32; None for any other equation."""
    params, name = equation.params, equation.primitive.name
    if name not in ("dot_general", "conv_general_dilated"):
        return None
    lhs, rhs, out = (atom.aval for atom in (*equation.invars, *equation.outvars))
    if not lhs.dtype == rhs.dtype == out.dtype == jnp.float32 or not out.size:
        return None
    if name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        positions = math.prod(lhs.shape[i] for i in contracted)
        shared = positions * math.prod(lhs.shape[i] for i in batch)
        return (positions, lhs.size // shared, rhs.size // shared) if shared else None
    plain = params["feature_group_count"] == params["batch_group_count"] == 1
    if not plain or any(dilation > 1 for dilation in params["lhs_dilation"]):
        return None
    outputs, *positions = (rhs.shape[i] for i in params["dimension_numbers"].rhs_spec)
    return math.prod(positions), out.size // outputs, outputs


def _rows(equation, lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lays out the operands of a product as rows, [*b, T, d] and [*b, T, p]."""
    params = equation.params
    if equation.primitive.name == "dot_general":
        (of_lhs, of_rhs) = zip(*params["dimension_numbers"], strict=True)
        return _laid_out(lhs, *of_lhs), _laid_out(rhs, *of_rhs)
    numbers = params["dimension_numbers"]
    n, c, *space = numbers.lhs_spec
    o, f, *window = numbers.rhs_spec
    images = conv.pad(jnp.transpose(lhs, (c, *space, n)), params["padding"])
    gradients = jnp.transpose(rhs, (f, *window, o))
    shape = equation.outvars[0].aval.shape
    taps = itertools.product(*(range(shape[axis]) for axis in numbers.out_spec[2:]))
    spread = gradients.shape[1:-1]
    pieces = [conv.window(params, images, tap, spread) for tap in taps]
    rows = jnp.concatenate(pieces, -1)
    return rows.reshape(-1, rows.shape[-1]), gradients.reshape(-1, gradients.shape[-1])


def _laid_out(operand: jax.Array, contracted, batch) -> jax.Array:
    """Transposes the operand of a product to [*b, T, n]."""
    free = [i for i in range(operand.ndim) if i not in (*batch, *contracted)]
    sizes = [operand.shape[i] for i in batch]
    positions = math.prod(operand.shape[i] for i in contracted)
    operand = jnp.transpose(operand, (*batch, *contracted, *free))
    return operand.reshape(*sizes, positions, -1)


def _finished(equation, sizes: tuple[int, int, int], product: jax.Array) -> jax.Array:
    """Lays a sum of products out as the output of its equation, of T, d and p."""
    product = product if _order(*sizes[1:]) == "dp" else product.mT
    shape = equation.outvars[0].aval.shape
    if equation.primitive.name == "dot_general":
        return product.reshape(shape)
    n, o, *taps = equation.params["dimension_numbers"].out_spec
    axes = (*taps, n, o)
    product = product.reshape([shape[i] for i in axes])
    return jnp.moveaxis(product, range(len(axes)), axes)


# The rewrite of a traced gradient.


def _rewritten(
    closed: core.ClosedJaxpr, keep: Callable[[int, int, int], bool]
) -> tuple[Callable[..., list[PyTree]], list[_Source]]:
    """Puts what is kept in the place of gradients, and says how these come of it."""
    sources: dict[int, _Source] = {}
    try:
        closed = _with_kept(closed, {})
        sources = _sources(closed.jaxpr, keep)
        sources.pop(0, None)  # the loss
        jax.eval_shape(functools.partial(_interpret, closed, sources), *closed.in_avals)
    except (AttributeError, TypeError, NotImplementedError, KeyError) as error:
        warnings.warn(
            f"jax {jax.__version__} does not let us find factors, so that every"
            f" per-record gradient is formed: {type(error).__name__}: {error}",
            stacklevel=3,
        )
        sources = {}
    gradients = range(1, len(closed.jaxpr.outvars))
    outputs = functools.partial(_interpret, closed, sources)
    return outputs, [sources.get(k, _Source()) for k in gradients]


def _sources(
    jaxpr: core.Jaxpr, keep: Callable[[int, int, int], bool]
) -> dict[int, _Source]:
    """Finds the outputs in whose place something smaller can be kept."""
    producers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    atoms = (*jaxpr.outvars, *(a for e in jaxpr.eqns for a in e.invars))
    uses = collections.Counter(filter(_is_variable, atoms))

    def find(var: Any, alone: bool) -> _Source | None:
        if not _is_variable(var) or var not in producers:
            return None
        equation, alone = producers[var], alone and uses[var] == 1
        name, position = equation.primitive.name, equation.outvars.index(var)
        sizes = _sizes(equation)
        if sizes and keep(*sizes):
            finish = functools.partial(_finished, equation, sizes)
            return _Source(equation, position, None, sizes[1], finish)
        if name in _BODIES and alone:
            body = _closed(equation.params["jaxpr"]).jaxpr
            inner = _sources(body, keep).get(position)
            stacked = var.aval.ndim > body.outvars[position].aval.ndim
            if inner and inner.inputs and (stacked or name != "scan"):  # or it adds up
                each = jax.vmap(inner.finish) if stacked else inner.finish
                return _Source(equation, position, inner, inner.inputs, each)
        if name in _LAYOUT:
            operand: Any = equation.invars[0]
            found = None
            if operand.aval.size == var.aval.size:
                found = find(operand, alone)
            elif isinstance(operand, core.Literal) and operand.val == 0:
                found = _Source(equation, position)  # the loss does not depend on it
            return found and found._replace(
                finish=lambda total: _evaluated(equation, found.finish(total))
            )
        return None

    found = {k: find(var, True) for k, var in enumerate(jaxpr.outvars)}
    return {k: source for k, source in found.items() if source is not None}


def _evaluated(equation, operand: jax.Array) -> jax.Array:
    return conv.bind(equation, [operand], dict(equation.params))[0]


def _with_kept(
    closed: core.ClosedJaxpr, sources: dict[int, _Source]
) -> core.ClosedJaxpr:
    """Returns the jaxpr with what is kept in the place of these outputs.

    Rows [*b, T, d] and [*b, T, p] are one array there, for the jaxpr is also the body
    of an equation, whose number of outputs JAX knows.
    """

    def function(*args):
        outputs = _interpret(closed, sources, *args)
        pairs = (x if isinstance(x, tuple) else (x,) for x in outputs)
        return [x[0] if len(x) == 1 else jnp.concatenate(x, -1) for x in pairs]

    return jax.make_jaxpr(function)(*(var.aval for var in closed.jaxpr.invars))


def _interpret(
    closed: core.ClosedJaxpr, sources: dict[int, _Source], *args: Any
) -> list[Any]:
    """Evaluates a jaxpr, without what only the replaced outputs need."""
    jaxpr = closed.jaxpr
    values: dict[core.Var, Any] = {}
    values.update(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return values[atom] if _is_variable(atom) else atom.val

    inside: dict[int, dict[int, _Source]] = collections.defaultdict(dict)
    wanted = [var for k, var in enumerate(jaxpr.outvars) if k not in sources]
    for equation, position, inner, *_ in sources.values():
        if inner:
            inside[id(equation)][position] = inner
            wanted.append(equation.outvars[position])
        else:
            wanted.extend(equation.invars)
    for equation in _needed(jaxpr, wanted):
        name, params = equation.primitive.name, dict(equation.params)
        inputs = list(map(read, equation.invars))
        if name in _BODIES:
            body = _with_kept(_closed(params["jaxpr"]), inside[id(equation)])
            params["jaxpr"] = _like(params["jaxpr"], body)
        outputs = (
            _interpret(params["jaxpr"], {}, *inputs)
            if name in _CALLS
            else conv.bind(equation, inputs, params)
        )
        values.update(zip(equation.outvars, outputs, strict=True))

    def output(k):
        if k not in sources:
            return read(jaxpr.outvars[k])
        equation, position, inner, inputs, _ = sources[k]
        if inner:
            kept = read(equation.outvars[position])
            return tuple(jnp.split(kept, [inputs], -1)) if inputs else kept
        operands = list(map(read, equation.invars))
        return _rows(equation, *operands) if inputs else operands[0]

    return [output(k) for k in range(len(jaxpr.outvars))]


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


def _closed(jaxpr: Any) -> core.ClosedJaxpr:
    """Returns the body of an equation as a closed jaxpr."""
    is_closed = isinstance(jaxpr, core.ClosedJaxpr)
    return jaxpr if is_closed else core.ClosedJaxpr(jaxpr, ())


def _like(jaxpr: Any, closed: core.ClosedJaxpr) -> Any:
    """Returns a closed jaxpr in the form that an equation had its body in."""
    if isinstance(jaxpr, core.ClosedJaxpr):
        return closed
    if closed.consts:
        raise NotImplementedError("a body without room for its constants")
    return closed.jaxpr
