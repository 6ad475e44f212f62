"""Ghost clipping against plain loops, and what a changed record can do to it."""

import functools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting import NeighboringRelation

from dpmix_jax import (
    Mechanism,
    UserError,
    clipped_gradient,
    conv,
    data,
    ghost_clipped_gradient,
    models,
    training,
)
from dpmix_jax.ghost import _norms_of_products, always
from dpmix_jax.run import build
from dpmix_jax.run.config import from_config_dict
from tests import toy
from tests.test_config import load as load_config
from tests.test_gradients import oracle, sets, toy_sum

NHWC = ("NHWC", "HWIO", "NHWC")


def draw(seed, *shape):
    drawn = np.random.default_rng(seed).normal(size=shape) / shape[-1] ** 0.5
    return jnp.asarray(drawn, jnp.float32)


def loss_of(logits_fn):
    def loss_fn(params, images, labels):
        logits = logits_fn(params, images)
        return optax.softmax_cross_entropy(logits, labels).mean()

    return loss_fn


def flattened(images):
    return images.reshape(len(images), -1)


def dense(params, images):
    hidden = jnp.tanh(flattened(images) @ params["in"] + params["bias"][None])
    return hidden @ params["out"]


DENSE = {"in": draw(0, 36, 32), "bias": draw(1, 32), "out": draw(2, 32, 3)}


def shared(params, images):
    """One matrix twice, another once."""
    x = jnp.tanh(flattened(images) @ params["in"])
    for _ in range(2):
        x = jnp.tanh(x @ params["again"])
    return x @ params["out"]


def shared_by_jit(params, images):
    """The same through one traced function called twice."""
    layer = jax.jit(lambda x: jnp.tanh(x @ params["again"]))
    return layer(layer(jnp.tanh(flattened(images) @ params["in"]))) @ params["out"]


def remat(params, images):
    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(jnp.tanh(x) @ w)

    x = layer(flattened(images), params["in"])
    return jax.checkpoint(layer)(x, params["again"]) @ params["out"]


def summed(params, images):
    """The gradient of one matrix is needed for that of another."""
    layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
    x = flattened(images) @ params["in"]
    return layer(x, params["again"] + 2 * params["stack"][0]) @ params["out"]


def scan(params, images):
    """A matrix of its own for each round."""
    x = flattened(images) @ params["in"]
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
    return x @ params["out"]


def scan_of_one(params, images):
    """The same matrix in each round, and the scan within `jit` and `remat`."""

    @jax.jit
    @jax.checkpoint
    def body(x):
        step = lambda x, _: (jnp.tanh(x @ params["again"]), None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=3)[0]

    return body(flattened(images) @ params["in"]) @ params["out"]


def branches(params, images):
    x = flattened(images) @ params["in"]
    x = jax.lax.cond(x[0, 0] > 0, jnp.tanh, lambda x: x @ params["again"], x)
    return x @ params["out"]


def experts(params, images):
    """A matrix with a batch axis, another transposed and reshaped first."""
    x = images.reshape(len(images), 4, 9)
    x = jnp.tanh(jnp.einsum("ked,edp->kep", x, params["experts"]))
    matrix = params["kernel"].transpose(2, 0, 1).reshape(32, 3)
    return x.reshape(len(images), -1) @ matrix


def strided(params, images):
    """A few positions for many channels: the kernel's norm is a ghost norm."""
    x = images.reshape(len(images), 3, 3, 4)
    x = jax.lax.conv_general_dilated(
        x, params["first"], (2, 2), "SAME", dimension_numbers=NHWC
    )
    x = jax.lax.conv_general_dilated(
        jnp.tanh(x),
        params["second"],
        (1, 1),
        ((1, 0), (0, 1)),
        rhs_dilation=(1, 2),
        dimension_numbers=NHWC,
    )
    return jnp.tanh(x).mean((1, 2)) @ params["out"]


class Tokens(nn.Module):
    """Attention and a Dense over six tokens."""

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(24)(images.reshape(len(images), 6, 6))
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = x + nn.Dense(24)(nn.gelu(nn.Dense(48)(x)))
        return nn.Dense(3)(x.mean(1))


AGAIN = DENSE | {"again": draw(3, 32, 32), "stack": draw(4, 3, 32, 32)}
PLAIN = {
    "conv": (toy.logits_fn, toy.init_params()),
    "dense": (dense, DENSE),
    "shared": (shared, AGAIN),
    "shared_by_jit": (shared_by_jit, AGAIN),
    "remat": (remat, AGAIN),
    "summed": (summed, AGAIN),
    "scan": (scan, AGAIN),
    "scan_of_one": (scan_of_one, AGAIN),
    "branches": (branches, AGAIN),
    "experts": (experts, {"experts": draw(5, 4, 9, 8), "kernel": draw(6, 8, 3, 4)}),
    "strided": (
        strided,
        {
            "first": draw(7, 3, 3, 4, 16),
            "second": draw(8, 2, 2, 16, 32),
            "out": draw(9, 32, 3),
        },
    ),
}
IN_FLAX = {
    "wrn": models.create("wrn", 3, depth=10, width=1),
    "cnn": models.create("cnn", 3, features=(8, 8)),
    "tokens": Tokens(),
}


def check_against_the_loop(loss_fn, params, images, labels, clip_norm):
    gradient_of_one = jax.jit(jax.grad(loss_fn))
    expected, norms = oracle(params, images, labels, clip_norm, gradient_of_one)
    gradient_fn = ghost_clipped_gradient(loss_fn, l2_clip_norm=clip_norm)
    total, aux = jax.jit(gradient_fn)(params, images, labels)
    assert jax.tree.structure(total) == jax.tree.structure(params)
    np.testing.assert_allclose(toy.flat(total), expected, atol=2e-5 * clip_norm)
    np.testing.assert_allclose(aux.grad_norms, norms, rtol=2e-5, atol=1e-7)
    loss = jax.jit(loss_fn)
    losses = [loss(params, *record) for record in zip(images, labels, strict=True)]
    np.testing.assert_allclose(aux.values, np.array(losses), rtol=1e-5)
    return gradient_fn, total


@pytest.mark.sampled("conv", "dense")
@pytest.mark.parametrize("name", PLAIN)
def test_equals_a_loop(name):
    logits_fn, params = PLAIN[name]
    check_against_the_loop(loss_of(logits_fn), params, *sets(3, 2), clip_norm=0.2)


@pytest.mark.sampled
def test_jit_equals_eager():
    gradient_fn, total = check_against_the_loop(
        loss_of(remat), AGAIN, *sets(3, 2), clip_norm=0.2
    )
    eager, _ = gradient_fn(AGAIN, *sets(3, 2))
    np.testing.assert_allclose(toy.flat(eager), toy.flat(total), atol=1e-6)


@pytest.mark.sampled
@jax.numpy_dtype_promotion("standard")  # Flax relies on it
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "wrn" else [])
        for name in IN_FLAX
    ],
)
def test_equals_a_loop_in_flax(name):
    images, labels = sets(2, 2)
    if name != "tokens":
        images = jax.random.normal(jax.random.key(5), (2, 2, 8, 8, 3))
    params = jax.jit(IN_FLAX[name].init)(jax.random.key(0), images[0])
    loss_fn = loss_of(IN_FLAX[name].apply)
    check_against_the_loop(loss_fn, params, images, labels, 0.2)


@pytest.mark.slow
@hypothesis.given(
    num_records=st.integers(0, 5),
    set_size=st.integers(1, 20),
    clip_norm=st.sampled_from([1e-3, 0.1, 0.5, 10.0]),
    seed=st.integers(0, 99),
)
@hypothesis.settings(max_examples=6)
def test_any_size(num_records, set_size, clip_norm, seed):
    """Both sides of the choice: 2 K^2 against 1152 and 96."""
    images, labels = sets(num_records, set_size, seed)
    check_against_the_loop(loss_of(dense), DENSE, images, labels, clip_norm)


def largest_array(function, *args):
    """Elements of the largest array in a traced function, bodies included."""

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (var.aval.size for var in equation.outvars)
            for inner in conv.inner_jaxprs(equation.params):
                yield from sizes(inner)

    return max(sizes(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["dense", "remat", "scan", "strided", "experts"])
def test_forms_no_gradient_of_a_record_where_factors_are_smaller(name):
    """The largest array is smaller than one matrix for each of 64 records."""
    logits_fn, params = PLAIN[name]
    images, labels = sets(64, 1)
    matrices = [leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    used = {"remat": 32 * 32, "scan": 3 * 32 * 32}.get(name, max(matrices))
    arrays = {}
    for transform in (clipped_gradient, ghost_clipped_gradient):
        function = transform(loss_of(logits_fn), l2_clip_norm=0.1)
        arrays[transform] = largest_array(function, params, images, labels)
    assert arrays[clipped_gradient] >= 64 * used
    assert arrays[ghost_clipped_gradient] < 64 * used


@pytest.mark.sampled("16-True")
@pytest.mark.parametrize(("set_size", "is_ghost"), [(16, True), (17, False)])
def test_the_smaller_of_the_two_is_kept(set_size, is_ghost):
    """For 36 x 32 up to 16 positions: 16 rows of 68 numbers, and a matrix of 1152."""
    images, labels = sets(64, set_size)

    def loss_fn(params, images, labels):
        return jnp.square(flattened(images) @ params).sum() + labels.sum()

    gradient_fn = ghost_clipped_gradient(loss_fn, l2_clip_norm=0.1)
    formed = largest_array(gradient_fn, DENSE["in"], images, labels) >= 64 * 36 * 32
    assert formed != is_ghost


@pytest.mark.sampled
def test_what_the_loss_ignores_is_not_formed():
    """Nor kept: its gradient, zeros, is one number for each record."""
    params = {"used": DENSE["in"], "frozen": jnp.ones((1000, 1000))}

    def loss_fn(params, images, labels):
        ignored = jax.lax.stop_gradient(params["frozen"])[0, 0]
        return jnp.square(flattened(images) @ params["used"]).sum() * ignored

    gradient_fn = ghost_clipped_gradient(loss_fn, l2_clip_norm=0.1)
    records = sets(64, 1)
    assert largest_array(gradient_fn, params, *records) == 1000 * 1000
    total, _ = gradient_fn(params, *records)
    assert total["frozen"].shape == (1000, 1000)
    assert not total["frozen"].any()
    assert total["used"].any()


def head(params, embeddings, labels):
    """A linear head over embeddings [K, E] that were kept in half precision."""
    logits = embeddings.astype(jnp.float32) @ params["kernel"] + params["bias"][None]
    return optax.softmax_cross_entropy(logits, labels).mean()


HEAD = {"kernel": draw(10, 40, 5), "bias": draw(11, 5)}


@functools.cache
def compiled_head(clip_norm=0.3):
    gradient_fn = ghost_clipped_gradient(head, l2_clip_norm=clip_norm, keep=always)
    return jax.jit(gradient_fn)


def embedded(num, set_size, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    labels = jax.random.randint(keys[1], (num, set_size), 0, 5)
    embeddings = jax.random.normal(keys[0], (num, set_size, 40))
    return embeddings, jax.nn.one_hot(labels, 5)


@pytest.mark.sampled
@pytest.mark.parametrize("set_size", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_head_forms_no_gradient_of_a_record(set_size, dtype):
    """35 records are no multiple of a block, and 8 rows are more than a matrix."""
    embeddings, labels = embedded(35, set_size)
    records = embeddings.astype(dtype), labels
    gradient_fn = compiled_head()
    expected, norms = oracle(HEAD, *records, 0.3, jax.jit(jax.grad(head)))
    total, aux = gradient_fn(HEAD, *records)
    np.testing.assert_allclose(toy.flat(total), expected, rtol=5e-5, atol=1e-6)
    np.testing.assert_allclose(aux.grad_norms, norms, rtol=5e-5)
    assert max(norms) > 0.3
    largest = max(embeddings.size, 35 * set_size**2)
    assert largest_array(gradient_fn, HEAD, *records) <= largest


@pytest.mark.sampled("2-nan", "2-inf", "2-3e+38", "2-30.0")
@pytest.mark.proves("ghost.ghost_clipped_gradient", 1, 2, 3, 4)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38, 30.0])
@pytest.mark.parametrize("set_size", [1, 2])
def test_a_changed_record_moves_the_sum_of_a_head_by_its_term(set_size, bad):
    embeddings, labels = embedded(35, set_size)
    gradient_fn, nothing = compiled_head(), jnp.zeros(35, bool)
    without = nothing.at[34].set(True)  # in the block that overlaps another
    spoiled = embeddings.at[34, -1, 3].set(bad)
    sums = [
        toy.flat(gradient_fn(HEAD, x, labels, is_padding_example=padding)[0])
        for x, padding in (
            (embeddings, nothing),
            (embeddings, without),
            (spoiled, without),
            (spoiled, nothing),
        )
    ]
    np.testing.assert_array_equal(sums[1], sums[2])
    one = jax.jit(jax.grad(head))
    expected, _ = oracle(HEAD, embeddings[34:], labels[34:], 0.3, one)
    np.testing.assert_allclose(sums[0] - sums[1], expected, atol=2e-6)
    moved = np.linalg.norm(sums[3] - sums[1])
    assert moved <= 0.3 * (1 + 1e-5)
    assert np.isfinite(bad) or moved == 0


@pytest.mark.sampled("1e-06-8")
@pytest.mark.proves("ghost.ghost_clipped_gradient", 2, 6)
@pytest.mark.parametrize("set_size", [2, 8])
@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-3, 1.0])
def test_the_bound_of_a_head_holds_where_members_cancel(set_size, apart):
    """Pairs of equal embeddings, up to `apart`, whose labels pull opposite ways."""
    embeddings, _ = embedded(4, set_size)
    embeddings = embeddings.at[:, 1::2].set(embeddings[:, ::2] + apart)
    signs = jnp.tile(jnp.array([1.0, -1.0]), set_size // 2)

    def loss_fn(params, embeddings, labels):
        logits = embeddings @ params["kernel"] + params["bias"][None]
        return 1e3 * (labels[:, None] * logits).sum()

    gradient_fn = jax.jit(
        ghost_clipped_gradient(loss_fn, l2_clip_norm=1e-3, keep=always)
    )
    labels = jnp.broadcast_to(signs, (4, set_size))
    for i in range(4):
        others = jnp.arange(4) != i
        total, aux = gradient_fn(HEAD, embeddings, labels, is_padding_example=others)
        assert np.linalg.norm(np.float64(toy.flat(total))) <= 1e-3
        a = np.float64(embeddings[i])
        true = 1e3 * np.linalg.norm(np.float64(signs) @ a) * 5**0.5
        assert aux.grad_norms[i] >= true * (1 - 1e-7)


LOSSES = {"conv": (toy.loss_fn, toy.init_params()), "dense": (loss_of(dense), DENSE)}


@pytest.mark.sampled("dense")
@pytest.mark.proves("ghost.ghost_clipped_gradient", 4)
@pytest.mark.parametrize("name", LOSSES)
def test_padding_counts_exactly_nothing(name):
    loss_fn, params = LOSSES[name]
    images, labels = sets(4, 2)
    gradient_fn = jax.jit(ghost_clipped_gradient(loss_fn, l2_clip_norm=0.3))
    padding = jnp.array([False, True, False, True])
    padded, _ = gradient_fn(params, images, labels, is_padding_example=padding)
    for bad in (jnp.nan, 7.0, 3e38):
        other = images.at[1].set(bad).at[3].set(7.0)
        repadded, _ = gradient_fn(params, other, labels, is_padding_example=padding)
        np.testing.assert_array_equal(toy.flat(padded), toy.flat(repadded))
    assert toy.flat(padded).any()
    for whole in (images, other, images * jnp.nan):
        none, _ = gradient_fn(
            params, whole, labels, is_padding_example=jnp.ones(4, bool)
        )
        assert not toy.flat(none).any()


@pytest.mark.sampled("conv")
@pytest.mark.proves("ghost.ghost_clipped_gradient", 1)
@pytest.mark.parametrize("name", LOSSES)
def test_a_record_is_blind_to_the_others(name):
    """Its term, the sum less the sum without it, is the same whatever they are."""
    loss_fn, params = LOSSES[name]
    images, labels = sets(4, 2)
    gradient_fn = ghost_clipped_gradient(loss_fn, l2_clip_norm=0.3)
    total = jax.jit(lambda *args: toy_sum(gradient_fn, *args))
    one = jax.jit(jax.grad(loss_fn))
    expected, _ = oracle(params, images[:1], labels[:1], 0.3, one)
    for others in (images, images.at[1:].set(5.0), images.at[1:].set(jnp.nan)):
        whole = total(params, others.at[0].set(images[0]), labels, jnp.zeros(4, bool))
        without = total(params, others, labels, jnp.arange(4) == 0)
        np.testing.assert_allclose(whole - without, expected, atol=1e-6)
    _, before = gradient_fn(params, images, labels)
    _, after = gradient_fn(params, images.at[2].set(5.0), labels)
    others = np.arange(4) != 2
    np.testing.assert_array_equal(before.grad_norms[others], after.grad_norms[others])


@functools.cache
def compiled(name, clip_norm):
    """The transformed loss, its flat sum, and the gradient of one image."""
    loss_fn, _ = LOSSES[name]
    gradient_fn = ghost_clipped_gradient(loss_fn, l2_clip_norm=clip_norm)
    total = jax.jit(lambda *args: toy_sum(gradient_fn, *args))
    return gradient_fn, total, jax.jit(jax.grad(loss_fn))


@pytest.mark.sampled
@pytest.mark.proves("ghost.ghost_clipped_gradient", 2, 3)
@hypothesis.given(
    name=st.sampled_from(sorted(LOSSES)),
    bad=st.sampled_from([0.0, 3.0, np.nan, np.inf, -np.inf, 1e30, 3e38, 1e-38]),
    share=st.sampled_from([0.03, 1.0]),
    clip_norm=st.sampled_from([0.01, 1.0]),
)
@hypothesis.settings(max_examples=16)
def test_a_changed_record_moves_the_sum_by_the_sensitivity(name, bad, share, clip_norm):
    """Removed, added or replaced, also by pixels that are no numbers."""
    loss_fn, params = LOSSES[name]
    images, labels = sets(4, 3)
    gradient_fn, total, one = compiled(name, clip_norm)
    spoiled = images.at[2, :, : max(1, int(6 * share)), :, :].set(bad)
    whole, without, replaced = (
        total(params, images, labels, jnp.zeros(4, bool)),
        total(params, images, labels, jnp.arange(4) == 2),
        total(params, spoiled, labels, jnp.zeros(4, bool)),
    )
    slack = 1 + 1e-5
    add_remove = gradient_fn.sensitivity(NeighboringRelation.ADD_OR_REMOVE_ONE)
    replace = gradient_fn.sensitivity(NeighboringRelation.REPLACE_ONE)
    peer = clipped_gradient(loss_fn, l2_clip_norm=clip_norm)
    assert peer.sensitivity(NeighboringRelation.ADD_OR_REMOVE_ONE) == add_remove
    assert peer.sensitivity(NeighboringRelation.REPLACE_ONE) == replace
    assert np.linalg.norm(whole - without) <= add_remove * slack
    _, norms = oracle(params, images[2:3], labels[2:3], clip_norm, one)
    length = min(norms[0], clip_norm)  # no slack is wasted
    assert np.linalg.norm(whole - without) == pytest.approx(length, rel=1e-3)
    assert np.linalg.norm(replaced - without) <= add_remove * slack
    assert np.linalg.norm(replaced - whole) <= replace * slack
    if not np.isfinite(bad):
        np.testing.assert_array_equal(replaced, without)


@pytest.mark.proves("ghost.ghost_clipped_gradient", 3)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e30, 0.0])
def test_a_bad_record_spoils_no_other_where_zeros_are_bad_too(bad):
    """A model that is NaN at zeros, and positions that no gradient reaches."""

    def loss_fn(params, images, labels):
        x = flattened(images)
        x = x / jnp.sqrt(jnp.square(x).sum(1, keepdims=True))
        logits = jnp.tanh(x @ params["in"]) @ params["out"]
        return optax.softmax_cross_entropy(logits[:1], labels[:1]).mean()

    images, labels = sets(4, 3)
    gradient_fn = ghost_clipped_gradient(loss_fn, l2_clip_norm=0.1)
    total = jax.jit(lambda *args: toy_sum(gradient_fn, *args))
    without = total(DENSE, images, labels, jnp.arange(4) == 2)
    assert np.linalg.norm(without) > 0.05
    for spoiled in (images.at[2].set(bad), images.at[2, 1].set(bad)):
        found = total(DENSE, spoiled, labels, jnp.zeros(4, bool))
        assert np.linalg.norm(found - without) <= 0.1 * (1 + 1e-5)


@pytest.mark.proves("ghost.ghost_clipped_gradient", 5)
def test_everything_is_float32():
    images, labels = sets(600, 1)
    gradient_fn = ghost_clipped_gradient(loss_of(dense), l2_clip_norm=1e-3)
    total, _ = jax.eval_shape(gradient_fn, DENSE, images, labels)
    assert {leaf.dtype for leaf in jax.tree.leaves(total)} == {jnp.dtype("float32")}

    @jax.checkpoint
    def inside(params, images):
        halves = [x.astype(jnp.bfloat16) for x in (images, params["in"])]
        hidden = jnp.tanh((flattened(halves[0]) @ halves[1]).astype(jnp.float32))
        return hidden @ params["out"]

    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), DENSE)
    for logits_fn, params in ((inside, DENSE), (dense, half)):
        records = [x.astype(params["in"].dtype) for x in sets(600, 1)]
        sums = [
            jax.jit(transform(loss_of(logits_fn), l2_clip_norm=1e-3))(params, *records)
            for transform in (ghost_clipped_gradient, clipped_gradient)
        ]
        narrow, expected = (toy.flat(total) for total, _ in sums)
        assert narrow.dtype == np.float32
        np.testing.assert_allclose(narrow, expected, rtol=1e-4, atol=1e-6)
    text = str(jax.make_jaxpr(gradient_fn)(DENSE, images, labels))
    products = text.count("dot_general[")
    assert text.count("(Precision.HIGHEST, Precision.HIGHEST)") == products > 0


def ghost_norm(a, g, addends):
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (a, g)]
        norm, _ = jax.jit(_norms_of_products, static_argnums=2)(*wide, addends)
        return float(norm)


def product(a, g):
    """The product of factors and sum_t |a_t| |g_t|, in float64."""
    a, g = np.float64(a), np.float64(g)
    return a.T @ g, np.linalg.norm(a, axis=1) @ np.linalg.norm(g, axis=1)


def one_by_one(a, g):
    """What the product of factors may round to where nothing is added in blocks."""
    total = np.zeros((a.shape[1], g.shape[1]), np.float32)
    for row, column in zip(a, g, strict=True):
        total += row[:, None] * column[None]
    return np.float64(total)


@pytest.mark.proves("ghost.ghost_clipped_gradient", 6)
@hypothesis.given(
    positions=st.sampled_from([1, 2, 50, 784]),
    width=st.sampled_from([3, 64, 2000]),
    offset=st.sampled_from([0.0, 1.0, 1e2, 1e4, 1e6]),
    scale=st.sampled_from([1e-18, 1.0, 1e15]),
    centred=st.booleans(),
    equal=st.booleans(),
    seed=st.integers(0, 9),
)
@hypothesis.example(2, 2000, 0.0, 1.0, False, True, 0)
def test_a_ghost_norm_is_never_too_small(
    positions, width, offset, scale, centred, equal, seed
):
    """Gradients that sum to 0 over a large common offset cancel nearly everything.

    Sums of equal numbers round to the same side each time.
    """
    rng = np.random.default_rng(seed)
    a = (rng.normal(size=(positions, width)) + offset) * scale
    g = rng.normal(size=(positions, 20)) / scale
    if equal:
        a, g = a * 0 + a[0, 0], g * 0 + g[0, 0]
    if centred and positions > 1:
        g -= g.mean(0)
    a, g = a.astype(np.float32), g.astype(np.float32)
    matrix, lengths = product(a, g)
    true = np.linalg.norm(matrix)
    found = ghost_norm(a, g, positions)
    assert found >= true
    assert found >= np.linalg.norm(one_by_one(a, g))
    assert found <= true + 6e-8 * (positions + 9) * lengths


@pytest.mark.proves("ghost.ghost_clipped_gradient", 6)
def test_no_square_vanishes():
    """One position large against small, another small against large."""
    a = jnp.array([[1e19, 0.0], [0.0, 1e-22]], jnp.float32)
    g = jnp.array([[1e-23, 0.0], [0.0, 1e19]], jnp.float32)
    true = np.linalg.norm(product(a, g)[0])
    assert ghost_norm(a, g, 2) == pytest.approx(true, rel=1e-5)
    assert not np.isfinite(ghost_norm(a.at[0].set(jnp.nan), g.at[0].set(0.0), 2))
    assert not np.isfinite(ghost_norm(a.at[0].set(0.0), g.at[0].set(jnp.inf), 2))


def linear(params, a, g):
    """Has the gradients sum_t a_t g_t^T and sum_t g_t."""
    return ((a @ params["kernel"] + params["bias"][None]) * g).sum()


SHAPES = {1: (3, 4), 7: (40, 30), 40: (100, 70), 300: (700, 600)}  # T: d, p


def factors(kind, positions, strength, seed):
    """[T, d], [T, p] whose product is `strength` times smaller than its addends."""
    rng = np.random.default_rng(seed)
    inputs, outputs = SHAPES[positions]
    a = rng.normal(size=(positions, inputs))
    g = rng.normal(size=(positions, outputs))
    half = positions // 2
    if kind == "offset":
        a, g = a + strength, g - g.mean(0)
    elif kind == "pairs":
        a[half : 2 * half], g[half : 2 * half] = a[:half], -g[:half]
        g[: 2 * half] *= strength
    elif kind == "bias":  # a sum that is exactly 0, but not where each has a weight
        g = np.round(3 * g) * 2.0 ** round(np.log2(strength))
        g[-1] -= g.sum(0)
        a = a / strength
    elif kind == "equal":
        a, g = np.full_like(a, 1 / 3), np.full_like(g, 1 / 7) * strength
        g[half : 2 * half] *= -1
    return a.astype(np.float32), g.astype(np.float32)


@functools.cache
def compiled_linear(positions, size, clip_norm):
    gradient_fn = jax.jit(ghost_clipped_gradient(linear, l2_clip_norm=clip_norm))
    inputs, outputs = SHAPES[positions]
    zeros = {"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}
    sizes = [(size, positions, n) for n in (inputs, outputs)]
    used = largest_array(gradient_fn, zeros, *map(jnp.zeros, sizes))
    assert positions == 1 or used < size * inputs * outputs  # no matrices
    return functools.partial(gradient_fn, zeros)


@pytest.mark.sampled
@pytest.mark.proves("ghost.ghost_clipped_gradient", 2, 6)
@hypothesis.given(
    kind=st.sampled_from(["offset", "pairs", "bias", "equal"]),
    positions=st.sampled_from(sorted(SHAPES)),
    strength=st.sampled_from([1.0, 1e2, 1e4, 1e6, 1e9]),
    clip_norm=st.sampled_from([0.1, 1e4]),
    seed=st.integers(0, 9),
)
@hypothesis.example("bias", 40, 1e9, 0.1, 0)
@hypothesis.example("bias", 300, 1e9, 0.1, 0)
@hypothesis.example("pairs", 300, 1e6, 0.1, 0)
@hypothesis.settings(max_examples=40)
def test_the_bound_holds_however_much_cancels(
    kind, positions, strength, clip_norm, seed
):
    """For one record alone, several that are the same, and beside float64.

    The first example has a bias whose gradient, a sum of 40 large numbers, is 0, and
    what these numbers times the clip factor round to is not. The second has a row that
    is longer than 1e12, and counts nothing.
    """
    a, g = factors(kind, positions, strength, seed)
    matrix, lengths = product(a, g)
    bias = np.float32(g).astype(np.float64).sum(0)
    size = 4 if positions < 100 else 2
    summed = compiled_linear(positions, size, clip_norm)
    same = [np.repeat(x[None], size, 0) for x in (a, g)]
    for counted in (1, size):
        padding = jnp.arange(size) >= counted
        total, aux = summed(*same, is_padding_example=padding)
        kernel, of_bias = (np.float64(total[name]) for name in ("kernel", "bias"))
        released = np.hypot(np.linalg.norm(kernel), np.linalg.norm(of_bias))
        assert released <= counted * clip_norm
        norm = float(aux.grad_norms[0])
        if max(np.linalg.norm(np.float64(x), axis=1).max() for x in (a, g)) > 1e12:
            assert norm == np.inf
            assert released == 0
            continue
        weight = counted * min(1.0, clip_norm / max(norm, 1e-30))
        rounded = 6e-8 * (2 * positions + 11)
        off = np.linalg.norm(kernel - weight * matrix)
        assert off <= rounded * lengths * weight
        # The bias is formed: what it rounds to before it is clipped is its gradient.
        slack = rounded * (
            lengths + np.linalg.norm(np.abs(g).astype(np.float64).sum(0))
        )
        true = np.hypot(np.linalg.norm(matrix), np.linalg.norm(bias))
        assert abs(norm - true) <= 2 * slack + 1e-6 * true


@pytest.mark.proves("ghost.ghost_clipped_gradient", 2)
def test_the_bound_holds_to_the_last_bit_where_gradients_are_formed():
    """The nearest float32 to C = 0.1 is larger."""
    gradient_fn = jax.jit(
        ghost_clipped_gradient(lambda bias, g: (bias * g).sum(), l2_clip_norm=0.1)
    )
    records = np.random.default_rng(0).normal(size=(100, 2, 9)).astype(np.float32)
    for pair in records:
        total, _ = gradient_fn(
            jnp.zeros(9), pair, is_padding_example=jnp.array([False, True])
        )
        assert 0.1 * (1 - 2e-6) <= np.linalg.norm(np.float64(total)) <= 0.1


@pytest.mark.sampled("3")
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_number_of_records_is_walled_off(size):
    """Norms and sums meet in a loop, out of whose body XLA computes nothing twice."""
    gradient_fn = jax.jit(ghost_clipped_gradient(linear, l2_clip_norm=0.01))
    params = {"kernel": jnp.zeros((40, 30)), "bias": jnp.zeros(30)}
    records = [jnp.zeros((size, 7, n)) for n in (40, 30)]
    assert " while(" in gradient_fn.lower(params, *records).compile().as_text()


@pytest.mark.proves("ghost.ghost_clipped_gradient", 3)
@pytest.mark.parametrize(("scale", "counts"), [(1e10, True), (1e13, False)])
def test_a_record_with_a_huge_factor_counts_nothing(scale, counts):
    a, g = factors("offset", 7, 1.0, 0)
    records = [np.repeat(x[None], 4, 0) for x in (a * np.float32(scale), g)]
    total, aux = compiled_linear(7, 4, 0.01)(*records)
    assert np.isfinite(aux.grad_norms).all() == toy.flat(total).any() == counts


@pytest.mark.proves("ghost.ghost_clipped_gradient", 3)
@pytest.mark.parametrize(("value", "counts"), [(0.4e12, True), (0.9e12, False)])
@pytest.mark.parametrize("positions", [1, 7])
def test_rows_are_measured_by_their_length(positions, value, counts):
    """The first has three or four such numbers, each below 1e12."""
    a, g = (np.zeros((4, positions, n), np.float32) for n in SHAPES[positions])
    a[:, 0, :4], g[:] = value, 1e-12
    total, _ = compiled_linear(positions, 4, 0.01)(a, g)
    assert toy.flat(total).any() == counts


@pytest.mark.proves("ghost.ghost_clipped_gradient", 2)
@pytest.mark.parametrize("offset", [1.0, 1e2, 1e4])
def test_the_bound_holds_where_nearly_everything_cancels(offset):
    def loss_fn(params, images, labels):
        """Of what is left of the outputs without their mean over 36 positions."""
        out = images.reshape(-1, 6) @ params
        wave = jnp.sin(jnp.arange(36.0)) * labels.sum()
        return wave @ (out - out.mean(0, keepdims=True)).sum(1)

    images, labels = sets(3, 6)
    params = draw(0, 6, 2000)
    clip_norm = 1e-2
    gradient_fn = ghost_clipped_gradient(loss_fn, l2_clip_norm=clip_norm)
    total = jax.jit(lambda *args: toy_sum(gradient_fn, *args))
    for i in range(3):
        alone = total(params, images + offset, labels, jnp.arange(3) != i)
        assert np.linalg.norm(alone) <= clip_norm * (1 + 1e-5)
        if offset <= 100:  # beyond that rounding might hide the gradient
            assert np.linalg.norm(alone) > 0.5 * clip_norm


def test_what_jax_cannot_do_is_formed_and_said(monkeypatch):
    monkeypatch.setattr("dpmix_jax.ghost._sources", {}.__getitem__)
    with pytest.warns(UserWarning, match="every per-record gradient is formed"):
        check_against_the_loop(loss_of(dense), DENSE, *sets(3, 2), 0.2)


def test_a_users_own_error_passes_through():
    def loss_fn(params, images):
        raise TypeError("theirs")

    with pytest.raises(TypeError, match="theirs"):
        ghost_clipped_gradient(loss_fn, l2_clip_norm=1.0)(DENSE, jnp.ones((2, 3)))


@pytest.mark.parametrize("clip_norm", [0.0, 1e-22, 1e39, float("nan")])
def test_refuses(clip_norm):
    with pytest.raises(UserError, match=r"l2_clip_norm is .*: it must be in \[1e-10"):
        ghost_clipped_gradient(toy.loss_fn, l2_clip_norm=clip_norm)


@pytest.mark.slow
def test_a_run_takes_the_same_way_as_by_default():
    """Three noisy updates on digits, through the config."""
    params = {}
    for clipping in ("instantiate", "ghost"):
        values = load_config()
        changes = {
            "model.features": (4, 8),
            "model.groups": 2,
            "method.k_base": 2,
            "method.k_self": 1,
            "performance.clipping": clipping,
        }
        values.update_from_flattened_dict(changes)
        config = from_config_dict(values)
        records = data.load(config.data).train
        mechanism = Mechanism(sampling_prob=0.02, num_updates=3, noise_multiplier=0.5)
        model = build.classifier(config, records)
        parts = build.build(
            config, model, model.shapes, records, mechanism=mechanism, seed=1
        )
        states = training.train(
            parts.state,
            parts.accumulate,
            parts.apply_update,
            parts.inputs,
            mesh=parts.mesh,
            batches=parts.batches(16),
            num_updates=3,
        )
        *_, (state, sums) = states
        assert sums["records"] > 0
        params[clipping] = toy.flat(state.params)
        moved = np.abs(params[clipping] - toy.flat(parts.state.params)).max()
        assert moved > 1e-2
    np.testing.assert_allclose(params["ghost"], params["instantiate"], atol=1e-5)
    assert not np.array_equal(params["ghost"], params["instantiate"])  # two ways


@pytest.mark.sampled
def test_rules_need_not_be_linear():
    """A backward rule that clips: gradients are weighted, and not losses."""

    @jax.custom_vjp
    def clipped(x):
        return x

    clipped.defvjp(
        lambda x: (x, None), lambda _, g: (g / jnp.maximum(jnp.abs(g).max(), 1e-9),)
    )

    def logits_fn(params, images):
        hidden = jnp.tanh(flattened(images) @ params["in"] + params["bias"][None])
        return clipped(hidden) @ params["out"]

    check_against_the_loop(loss_of(logits_fn), DENSE, *sets(3, 1), 0.1)


@pytest.mark.parametrize("norm", [1e20, 1e30, 1e36])
def test_a_weight_too_small_for_float32_is_none(norm):
    """A subnormal weight times a huge gradient could be longer than C."""
    params = {"shift": jnp.zeros(3)}

    def loss_fn(params, direction):
        return jnp.dot(params["shift"], direction)

    directions = jnp.array([[norm, 0.0, 0.0], [0.0, 1.0, 0.0]], jnp.float32)
    clip_norm = 1e-8
    gradient_fn = ghost_clipped_gradient(loss_fn, l2_clip_norm=clip_norm)
    total = toy.flat(jax.jit(gradient_fn)(params, directions)[0])
    # Of 1e36 C / norm is 1e-44, which float32 holds to a third only.
    assert total[0] == (0.0 if norm > 1e29 else pytest.approx(clip_norm, rel=1e-4))
    assert total[1] == pytest.approx(clip_norm, rel=1e-4)
