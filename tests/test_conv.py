import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import UserError, conv, models
from dpmix_jax.conv import FORMULATIONS, fast_convolutions

NHWC = ("NHWC", "HWIO", "NHWC")


def draw(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def per_record(loss, formulation, *, jit=True):
    gradient = fast_convolutions(jax.grad(loss), formulation=formulation)
    batched = jax.vmap(gradient, (None, 0))
    return jax.jit(batched) if jit else batched


def loop(loss, weights, images):
    """The oracle: one record after the other."""
    gradient = jax.jit(jax.grad(loss))
    each = [gradient(weights, image) for image in images]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def assert_close(found, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1.0))


def slow_convolutions(function, *args):
    """How many convolutions of two batched operands are left to XLA's groups."""
    text = str(jax.make_jaxpr(function)(*args))
    groups = [
        int(word.split("=")[1])
        for word in text.split()
        if word.startswith("feature_group_count=")
    ]
    return sum(group > 1 for group in groups)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=15)
def test_every_formulation_equals_a_loop(data):
    """Over strides, paddings, kernels, dilations, groups, layouts and dtypes."""
    formulation = data.draw(st.sampled_from(FORMULATIONS))
    kernel = data.draw(st.sampled_from([1, 2, 3, 5, 7]))
    stride, dilation = data.draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2)]))
    groups, per_group = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1)]))
    padding = data.draw(st.sampled_from(["SAME", "VALID", ((0, 2), (1, 0))]))
    layout = data.draw(st.sampled_from([NHWC, ("NCHW", "OIHW", "NCHW")]))
    dtype = data.draw(st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16]))
    size = dilation * (kernel - 1) + data.draw(st.integers(1, 7))
    channels = groups * per_group
    weights = draw(0, kernel, kernel, per_group, 4 * groups, dtype=dtype)
    images = draw(1, 3, 2, size, size + 1, channels, dtype=dtype)
    if layout != NHWC:
        weights = jnp.transpose(weights, (3, 2, 0, 1))
        images = jnp.moveaxis(images, -1, 2)

    def loss(weights, images):
        out = jax.lax.conv_general_dilated(
            images,
            weights,
            (stride, stride),
            padding,
            rhs_dilation=(dilation, dilation),
            feature_group_count=groups,
            dimension_numbers=layout,
        )
        return jnp.square(jnp.tanh(out)).sum()

    found = per_record(loss, formulation)(weights, images)
    tolerance = 2e-5 if dtype == jnp.float32 else 3e-2
    assert_close(found, loop(loss, weights, images), tolerance)


def test_one_dimensional_and_eager():
    def loss(weights, signals):
        numbers = ("NHC", "HIO", "NHC")
        out = jax.lax.conv_general_dilated(
            signals, weights, (1,), "SAME", dimension_numbers=numbers
        )
        return jnp.square(out).sum()

    weights, signals = draw(0, 3, 2, 5), draw(1, 4, 2, 9, 2)
    for formulation in FORMULATIONS:
        found = per_record(loss, formulation, jit=False)(weights, signals)
        assert_close(found, loop(loss, weights, signals))


@jax.jit
def _once(kernel, x):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=NHWC
    )


def _twice(kernel, x):
    return _once(kernel, _once(kernel, x))


@jax.custom_vjp
def _with_own_gradient(kernel, x):
    return _once(kernel, x)


_with_own_gradient.defvjp(
    lambda kernel, x: (_once(kernel, x), (kernel, x)),
    lambda saved, g: jax.tree.map(
        lambda leaf: 0.5 * leaf, jax.vjp(_once, *saved)[1](g)
    ),
)


def _regions(kernels, images):
    """Convolutions inside jit, remat, scan, cond and custom derivatives."""
    x = jax.nn.relu(jax.checkpoint(_once)(kernels[0], images))  # relu: a custom_jvp
    x, _ = jax.lax.scan(
        lambda x, kernel: (jnp.tanh(_once(kernel, x)), None), x, kernels[1:3]
    )
    x = jax.lax.cond(x.sum() > 0, _twice, _once, kernels[3], x)
    return jax.nn.logsumexp(_with_own_gradient(kernels[4], x))


def test_regions_change_no_number():
    kernels, images = 0.3 * draw(0, 5, 3, 3, 4, 4), draw(1, 3, 2, 6, 6, 4)
    found = per_record(_regions, "auto")(kernels, images)
    assert_close(found, loop(_regions, kernels, images))
    assert slow_convolutions(per_record(_regions, "plain"), kernels, images) >= 5
    assert slow_convolutions(per_record(_regions, "auto"), kernels, images) == 0


@pytest.mark.parametrize("name", ["cnn", pytest.param("wrn", marks=pytest.mark.slow)])
def test_our_models_lose_their_grouped_convolutions(name):
    options = {"features": (8, 8)} if name == "cnn" else {"depth": 10, "width": 1}
    model = models.create(name, 3, **options)
    images = draw(1, 2, 2, 8, 8, 3)
    params = model.init(jax.random.key(0), images[0])

    def loss(params, images):
        return jnp.square(model.apply(params, images)).sum()

    fast, plain = per_record(loss, "auto"), per_record(loss, "plain")
    assert slow_convolutions(plain, params, images) > 0
    assert slow_convolutions(fast, params, images) == 0
    assert_close(fast(params, images), loop(loss, params, images), 1e-4)


def test_what_is_not_per_record_is_left_alone():
    """No vmap, or a vmap over one operand: the same equations as without us."""

    def forward(weights, images):
        return _once(weights, images).sum()

    weights, images = draw(0, 3, 3, 4, 4), draw(1, 5, 2, 6, 6, 4)
    batched = jax.vmap(forward, (None, 0))
    ours = jax.vmap(fast_convolutions(forward), (None, 0))
    count = str(jax.make_jaxpr(batched)(weights, images)).count("conv_general")
    assert str(jax.make_jaxpr(ours)(weights, images)).count("conv_general") == count
    np.testing.assert_array_equal(ours(weights, images), batched(weights, images))
    one, same = (
        jax.jit(jax.grad(f)).lower(weights, images[0]).compile().as_text()
        for f in (
            forward,
            lambda w, x: fast_convolutions(forward, formulation="plain")(w, x),
        )
    )
    assert one.count("convolution(") == same.count("convolution(")


def test_depthwise_convolutions_are_no_groups_of_records():
    """As in ConvNeXt: 7x7, a filter for each channel."""

    def loss(weights, images):
        out = jax.lax.conv_general_dilated(
            images,
            weights,
            (1, 1),
            "SAME",
            dimension_numbers=NHWC,
            feature_group_count=6,
        )
        return jnp.square(out).sum()

    weights, images = draw(0, 7, 7, 1, 6), draw(1, 3, 2, 9, 8, 6)
    plain, fast = (
        str(jax.make_jaxpr(per_record(loss, formulation))(weights, images)).count(
            "conv_general_dilated["
        )
        for formulation in ("plain", "auto")
    )
    assert plain == fast + 1  # that of the weight gradient
    assert_close(per_record(loss, "auto")(weights, images), loop(loss, weights, images))


def test_large_windows_stay_with_xla():
    """A patch embedding has as many taps as pixels: products would be slower."""

    def loss(weights, images):
        out = jax.lax.conv_general_dilated(
            images, weights, (9, 9), "VALID", dimension_numbers=NHWC
        )
        return jnp.square(out).sum()

    weights, images = draw(0, 9, 9, 3, 4), draw(1, 2, 1, 18, 18, 3)
    assert slow_convolutions(per_record(loss, "auto"), weights, images) == 1
    assert_close(per_record(loss, "auto")(weights, images), loop(loss, weights, images))


def test_without_the_extension_points_it_warns_and_is_right(monkeypatch):
    def broken(*args):
        raise AttributeError("no such thing in this version")

    monkeypatch.setattr(conv, "_interpret", broken)

    def loss(weights, images):
        return jnp.square(_once(weights, images)).sum()

    weights, images = draw(0, 3, 3, 4, 4), draw(1, 2, 2, 5, 5, 4)
    with pytest.warns(UserWarning, match="per-record gradients are slow: Attribute"):
        found = per_record(loss, "auto")(weights, images)
    assert_close(found, loop(loss, weights, images))


def test_a_users_own_error_passes_through():
    def loss(weights):
        raise TypeError("theirs")

    with pytest.raises(TypeError, match="theirs"):
        fast_convolutions(jax.grad(loss))(jnp.ones(3))


def test_refuses():
    with pytest.raises(UserError, match="formulation is 'fft': it must be one of auto"):
        fast_convolutions(jnp.sin, formulation="fft")


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize(
    ("groups", "multiple", "kernel"),
    [(1, 4, 3), (2, 2, 3), (4, 1, 3), (4, 2, 3), (1, 4, 9), (4, 1, 9)],
)
def test_a_record_that_is_no_number_spoils_no_other(
    formulation, groups, multiple, kernel
):
    """XLA's groups of one convolution do let NaN through: 0 x NaN is NaN."""

    def loss(weights, images):
        out = jax.lax.conv_general_dilated(
            images,
            weights,
            (1, 1),
            "SAME",
            dimension_numbers=NHWC,
            feature_group_count=groups,
        )
        return jnp.square(out).sum()

    weights = draw(0, kernel, kernel, 4 // groups, groups * multiple)
    images = draw(1, 6, 2, 9, 9, 4)
    gradients = per_record(loss, formulation)
    expected = gradients(weights, images)
    for bad in (jnp.nan, jnp.inf):
        found = gradients(weights, images.at[1, 0, 2, 2].set(bad))
        others = np.arange(6) != 1
        np.testing.assert_array_equal(found[others], expected[others])
        assert not np.isfinite(found[1]).all()


def test_derivatives_of_every_order():
    """Forward mode, reverse mode and both together, on top of a gradient or alone."""

    def loss(weights, images):
        return jnp.tanh(_once(weights, images)).sum()

    weights, images = draw(0, 3, 3, 2, 3), draw(1, 3, 1, 5, 5, 2)

    def derivatives(wrap):
        gradients = jax.vmap(wrap(jax.grad(loss)), (None, 0))
        return (
            jax.jvp(lambda w: gradients(w, images), (weights,), (weights,))[1],
            jax.grad(lambda w: jnp.square(gradients(w, images)).sum())(weights),
            jax.jacfwd(lambda w: gradients(w, images))(weights),
            jax.vmap(jax.grad(wrap(loss)), (None, 0))(weights, images),
        )

    assert_close(derivatives(fast_convolutions), derivatives(lambda f: f))
