"""The clipped sum against plain loops, and what a changed record can do to it.

Sums on several devices and processes: `test_neighbours.py`.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting import NeighboringRelation
from flax import nnx

from dpmix_jax import (
    Mechanism,
    UserError,
    check_sensitivity,
    clipped_gradient,
    ghost_clipped_gradient,
    gradients,
    privatizer,
    sampling,
)
from tests import toy


def sets(num_records, set_size, seed=0):
    image_key, label_key = jax.random.split(jax.random.key(seed))
    images = jax.random.normal(image_key, (num_records, set_size, 6, 6, 1))
    labels = jax.random.dirichlet(label_key, jnp.ones(3), (num_records, set_size))
    return images, labels


gradient_of_one = jax.jit(jax.grad(toy.loss_fn))


def oracle(params, images, labels, clip_norm, gradient_of_one=gradient_of_one):
    """A loop over records and set members: average, clip, sum; in float64."""
    total = np.zeros(toy.flat(params).shape)
    norms = []
    for record_images, record_labels in zip(images, labels, strict=True):
        members = [
            toy.flat(gradient_of_one(params, image[None], label[None]))
            for image, label in zip(record_images, record_labels, strict=True)
        ]
        mean = np.mean(np.asarray(members, np.float64), axis=0)
        norms.append(np.linalg.norm(mean))
        total += mean * min(1.0, clip_norm / max(norms[-1], 1e-30))
    return total, np.array(norms)


@functools.cache
def summed(clip_norm=0.3):
    """Compiled, for records of two images wherever the shape does not matter."""
    return jax.jit(clipped_gradient(toy.loss_fn, l2_clip_norm=clip_norm))


@pytest.mark.sampled("4-2-0.3")
@pytest.mark.parametrize(
    ("num_records", "set_size", "clip_norm"),
    [(0, 2, 0.3), (4, 2, 0.01), (4, 2, 0.3), (4, 2, 1.0), (5, 1, 0.3)],
)
def test_equals_a_loop_over_records_and_members(num_records, set_size, clip_norm):
    for seed in range(3):
        params = toy.init_params(seed)
        images, labels = sets(num_records, set_size, seed)
        total, aux = summed(clip_norm)(params, images, labels)
        expected, norms = oracle(params, images, labels, clip_norm)
        atol = 2e-6 * clip_norm + 1e-6
        np.testing.assert_allclose(toy.flat(total), expected, atol=atol)
        np.testing.assert_allclose(aux.grad_norms, norms, rtol=1e-4, atol=1e-7)


@pytest.mark.sampled
def test_a_sum_has_the_shapes_of_the_parameters():
    params = {"scale": jnp.float32(2), "tensor": jnp.ones((2, 3, 4))}
    records = jnp.arange(48.0).reshape(2, 2, 3, 4)
    gradient_fn = clipped_gradient(
        lambda params, x: params["scale"] * (params["tensor"] * x).sum(),
        l2_clip_norm=1e6,
    )
    total, _ = gradient_fn(params, records)
    assert total["scale"] == records.sum()
    np.testing.assert_array_equal(total["tensor"], 2 * records.sum(0))


@pytest.mark.proves("gradients.clipped_gradient", 4)
def test_padding_counts_exactly_nothing():
    params = toy.init_params()
    images, labels = sets(4, 2)
    gradient_fn = summed()
    padding = jnp.array([False, True, False, True])
    padded, _ = gradient_fn(params, images, labels, is_padding_example=padding)
    other = images.at[1].set(jnp.nan).at[3].set(7.0)
    repadded, _ = gradient_fn(params, other, labels, is_padding_example=padding)
    np.testing.assert_array_equal(toy.flat(padded), toy.flat(repadded))
    assert toy.flat(padded).any()
    none, _ = gradient_fn(params, images, labels, is_padding_example=jnp.ones(4, bool))
    assert not toy.flat(none).any()


@pytest.mark.proves("gradients.clipped_gradient", 1)
def test_a_record_is_blind_to_the_others():
    """Its term, the sum less the sum without it, is the same whatever they are."""
    params = toy.init_params()
    images, labels = sets(4, 2)
    gradient_fn = summed()
    total = functools.partial(toy_sum, gradient_fn)
    expected, _ = oracle(params, images[:1], labels[:1], 0.3)
    for others in (images, images.at[1:].set(5.0), images.at[1:].set(jnp.nan)):
        whole = total(params, others.at[0].set(images[0]), labels, jnp.zeros(4, bool))
        without = total(params, others, labels, jnp.arange(4) == 0)
        np.testing.assert_allclose(whole - without, expected, atol=1e-6)
    _, before = gradient_fn(params, images, labels)
    _, after = gradient_fn(params, images.at[2].set(5.0), labels)
    others = np.arange(4) != 2
    np.testing.assert_array_equal(before.grad_norms[others], after.grad_norms[others])


@pytest.mark.proves("gradients.clipped_gradient", 1)
def test_constants_are_given_to_the_loss_and_have_no_gradient():
    params = toy.init_params()
    images, labels = sets(3, 2)

    def loss_fn(params, images, labels, scale, shift):
        return toy.loss_fn(params, scale * images + shift["by"], labels)

    total, aux = jax.jit(clipped_gradient(loss_fn, l2_clip_norm=0.3))(
        params, images, labels, constants=(jnp.float32(2), {"by": jnp.float32(1)})
    )
    expected, norms = oracle(params, 2 * images + 1, labels, 0.3)
    np.testing.assert_allclose(toy.flat(total), expected, atol=1e-6)
    np.testing.assert_allclose(aux.grad_norms, norms, rtol=1e-4)


@pytest.mark.proves("gradients.clipped_gradient", 2, 3)
@hypothesis.given(
    bad=st.sampled_from([0.0, 3.0, np.nan, np.inf, -np.inf, 1e30, 3e38, 1e-38]),
    share=st.sampled_from([0.03, 1.0]),
    clip_norm=st.sampled_from([0.01, 1.0]),
)
@hypothesis.settings(max_examples=12)
def test_a_changed_record_moves_the_sum_by_the_sensitivity(bad, share, clip_norm):
    """Removed, added or replaced, also by pixels that are no numbers."""
    params = toy.init_params()
    images, labels = sets(4, 2)
    gradient_fn = clipped_gradient(toy.loss_fn, l2_clip_norm=clip_norm)
    total = functools.partial(toy_sum, summed(clip_norm))
    spoiled = images.at[2, :, : max(1, int(6 * share)), :, :].set(bad)
    whole, without, replaced = (
        total(params, images, labels, jnp.zeros(4, bool)),
        total(params, images, labels, jnp.arange(4) == 2),
        total(params, spoiled, labels, jnp.zeros(4, bool)),
    )
    slack = 1 + 1e-5
    add_remove = gradient_fn.sensitivity(NeighboringRelation.ADD_OR_REMOVE_ONE)
    assert add_remove == clip_norm
    assert np.linalg.norm(whole - without) <= add_remove * slack
    _, norms = oracle(params, images[2:3], labels[2:3], clip_norm)  # no slack is wasted
    length = min(norms[0], clip_norm)
    assert np.linalg.norm(whole - without) == pytest.approx(length, rel=1e-3)
    assert np.linalg.norm(replaced - without) <= add_remove * slack
    replace = gradient_fn.sensitivity(NeighboringRelation.REPLACE_ONE)
    assert replace == 2 * clip_norm
    assert np.linalg.norm(replaced - whole) <= replace * slack


def toy_sum(gradient_fn, params, images, labels, padding):
    total, _ = gradient_fn(params, images, labels, is_padding_example=padding)
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(total)])


LAYERS = {"first": toy.init_params(), "second": {"bias": jnp.ones(3)}}
HOSTILE = {"huge": 1e30, "negative": -5.0, "NaN": jnp.nan}


def layered_loss(params, images, labels):
    logits = toy.logits_fn(params["first"], images) + params["second"]["bias"][None]
    return optax.softmax_cross_entropy(logits, labels).mean()


@pytest.mark.sampled("clip-False")
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", gradients.WEIGHTS)
def test_weights_equal_a_loop(name, per_layer):
    """By the formulas of the papers, in float64; per layer with C / sqrt(2) each."""
    clip_norm = 0.3
    images, labels = sets(4, 2)
    of = {
        "clip": lambda norm, most: min(1.0, most / norm),
        "automatic": lambda norm, most: most / (norm + 0.01),
    }[name]
    total, norms = {"first": 0.0, "second": 0.0}, []
    gradient_of_one = jax.jit(jax.grad(layered_loss))
    for record in zip(images, labels, strict=True):
        found = gradient_of_one(LAYERS, *record)
        layers = {k: np.asarray(toy.flat(v), np.float64) for k, v in found.items()}
        norms.append(np.linalg.norm([np.linalg.norm(x) for x in layers.values()]))
        for layer, x in layers.items():
            norm = np.linalg.norm(x) if per_layer else norms[-1]
            total[layer] += x * of(norm, clip_norm / 2 ** (per_layer / 2))
    gradient_fn = clipped_gradient(
        layered_loss,
        l2_clip_norm=clip_norm,
        weight=gradients.WEIGHTS[name],
        per_layer=per_layer,
    )
    for f in (gradient_fn, jax.jit(gradient_fn)):
        sums, aux = f(LAYERS, images, labels)
        for layer, expected in total.items():
            np.testing.assert_allclose(toy.flat(sums[layer]), expected, atol=2e-6)
        np.testing.assert_allclose(aux.grad_norms, norms, rtol=1e-5)


def test_an_array_outside_of_containers_is_a_layer():
    gradient_fn = clipped_gradient(
        lambda params, x: params["a"] @ x + params["b"] @ x,
        l2_clip_norm=1.0,
        per_layer=True,
    )
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    total, _ = gradient_fn(params, jnp.array([[3.0, 4.0]]))
    for leaf in total.values():
        np.testing.assert_allclose(leaf, np.array([0.6, 0.8]) / 2**0.5, rtol=1e-6)


def test_a_layer_of_nnx_has_a_kernel_and_a_bias():
    layer = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    leaves = {"first": layer, "second": layer}
    gradient_fn = clipped_gradient(
        lambda params, x: sum(jnp.sum(leaf * x) for leaf in jax.tree.leaves(params)),
        l2_clip_norm=1.0,
        per_layer=True,
    )
    total, _ = gradient_fn(leaves, jnp.array([50.0]))
    for part in total.values():  # of two layers, not of four
        assert np.linalg.norm(toy.flat(part)) == pytest.approx(0.5**0.5, rel=1e-5)


def test_weights_are_found_in_float32():
    """The square of 400 is no number of float16."""
    gradient_fn = clipped_gradient(
        lambda w, x: (w * x).sum(), l2_clip_norm=1.0, weight=gradients.automatic
    )
    records = jnp.full((1, 4), 200, jnp.float16)
    total, aux = gradient_fn(jnp.zeros(4, jnp.float16), records)
    np.testing.assert_allclose(total, 0.5, rtol=1e-3)
    assert aux.grad_norms.dtype == jnp.float32


@pytest.mark.parametrize("make", [clipped_gradient, ghost_clipped_gradient])
def test_a_clip_norm_may_be_a_number_of_numpy(make):
    options = {"expected_batch_size": 5, "key": sampling.noise_key(0)}
    mechanism = Mechanism(
        sampling_prob=0.1, num_updates=1, noise_multiplier=np.float32(2)
    )
    gradient_fn = make(lambda w, x: w @ x, l2_clip_norm=np.float32(0.5))
    assert isinstance(gradient_fn.sensitivity(), float)
    add = privatizer(gradient_fn, mechanism, **options)
    assert add.update(jnp.zeros(2), add.init(jnp.zeros(2)))[0].shape == (2,)


@pytest.mark.sampled
@pytest.mark.parametrize("make", [clipped_gradient, ghost_clipped_gradient])
def test_automatic_clipping_makes_the_clip_norm_a_factor(make):
    images, labels = sets(4, 2)
    one, two = (
        make(toy.loss_fn, l2_clip_norm=c, weight=gradients.automatic)(
            toy.init_params(), images, labels
        )[0]
        for c in (0.01, 2.0)  # no clip at 2
    )
    np.testing.assert_allclose(200 * toy.flat(one), toy.flat(two), rtol=1e-4)


@pytest.mark.sampled(
    "flat-clip", "flat-NaN", "per layer-automatic", "ghost-NaN", "ghost-huge"
)
@pytest.mark.proves("gradients.clipped_gradient", 2, 3)
@pytest.mark.proves("ghost.ghost_clipped_gradient", 2, 3)
@pytest.mark.parametrize("weight", [*gradients.WEIGHTS, *HOSTILE])
@pytest.mark.parametrize(
    "make",
    [
        clipped_gradient,
        functools.partial(clipped_gradient, per_layer=True),
        ghost_clipped_gradient,
    ],
    ids=["flat", "per layer", "ghost"],
)
def test_no_weight_breaks_the_bound(make, weight):
    of_norm = gradients.WEIGHTS.get(
        weight, lambda norm, _: jnp.full_like(norm, HOSTILE[weight])
    )
    gradient_fn = make(toy.loss_fn, l2_clip_norm=0.1, weight=of_norm)
    params = toy.init_params()

    @jax.jit
    def total(records, padding):
        return gradient_fn(params, *records, is_padding_example=padding)[0]

    moved = check_sensitivity(total, sets(3, 2), gradient_fn.sensitivity, indices=[1])
    assert weight in HOSTILE or max(moved.values()) > 0.09


@pytest.mark.proves("gradients.clipped_gradient", 5)
def test_the_sum_is_float32_whatever_the_loss_computes_in():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), toy.init_params())
    images, labels = sets(600, 1)
    gradient_fn = jax.jit(clipped_gradient(toy.loss_fn, l2_clip_norm=1e-3))
    half = (images.astype(jnp.bfloat16), labels.astype(jnp.bfloat16))
    total, aux = gradient_fn(params, *half)
    assert {leaf.dtype for leaf in jax.tree.leaves(total)} == {jnp.dtype("float32")}
    assert (np.asarray(aux.grad_norms, np.float32) > 1e-3).all()
    # 600 equal terms: a sum in bfloat16 would stall at 256 of them.
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], 600, axis=0), half)
    total, _ = gradient_fn(params, *same)
    assert np.linalg.norm(toy.flat(total)) == pytest.approx(600 * 1e-3, rel=1e-2)


@pytest.mark.parametrize(
    "clip_norm", [0.0, -1.0, 1e-22, 1e39, float("inf"), float("nan")]
)
def test_refuses(clip_norm):
    with pytest.raises(
        UserError, match=r"l2_clip_norm is .*: it must be in \[1e-10, 1e10\]"
    ):
        clipped_gradient(toy.loss_fn, l2_clip_norm=clip_norm)


@pytest.mark.parametrize(
    "options",
    [{"weight": gradients.automatic}, {"per_layer": True}, {"magnitudes": True}],
    ids=["automatic", "per layer", "magnitudes"],
)
def test_what_is_not_finite_counts_as_zero(options):
    """In norms, weights and magnitudes too, so that the rest of a record remains."""
    gradient_fn = clipped_gradient(lambda w, x: w @ x, l2_clip_norm=1.0, **options)
    damaged, whole = jnp.array([[[jnp.nan, 3.0, -jnp.inf]], [[0.0, 3.0, 0.0]]])
    total, aux = gradient_fn(jnp.zeros(3), damaged)
    expected, wanted = gradient_fn(jnp.zeros(3), whole)
    np.testing.assert_array_equal(total, expected)
    assert total[1] > 0.9
    if aux.aux is not None:
        np.testing.assert_array_equal(aux.aux, wanted.aux)
