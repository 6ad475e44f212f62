import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dpmix_jax import UserError, conv, models
from dpmix_jax.conv import FORMULATIONS, fast_convolutions

NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")


def draw(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def per_record(loss, formulation):
    gradient = fast_convolutions(jax.grad(loss), formulation=formulation)
    return jax.jit(jax.vmap(gradient, (None, 0)))


def loop(loss, weights, images):
    """The oracle: one record after the other."""
    gradient = jax.jit(jax.grad(loss))
    each = [gradient(weights, image) for image in images]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def assert_close(found, expected, tolerance=2e-5, message=""):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size = max(np.abs(b).max(), 1.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size, err_msg=message)


def slow_convolutions(function, *args):
    """How many convolutions have groups, as XLA makes of two batched operands."""
    text = str(jax.make_jaxpr(function)(*args))
    return len(re.findall(r"feature_group_count=(?!1\b)", text))


class Case(NamedTuple):
    """A convolution of records of two images; `channels` are those of one group."""

    space: Sequence[int]
    kernel: Sequence[int]
    strides: Sequence[int] = (1, 1)
    padding: Sequence[tuple[int, int]] = ((1, 1), (1, 1))
    rhs_dilation: Sequence[int] = (1, 1)
    lhs_dilation: Sequence[int] = (1, 1)
    groups: int = 1
    channels: tuple[int, int] = (3, 4)
    layout: Any = NHWC
    dtype: Any = jnp.float32

    def window(self) -> list[int]:
        """The size of the output along each axis."""
        return [
            ((size - 1) * spread + low + high - (taps - 1) * hole) // step + 1
            for size, taps, step, (low, high), hole, spread in zip(
                *self[:6], strict=True
            )
        ]

    def operands(self):
        """[out, in, *taps] of one kernel, and [n, in, *space] of three records."""
        into, out = self.channels
        kernel = draw(0, self.groups * out, into, *self.kernel, dtype=self.dtype)
        images = draw(1, 3, 2, self.groups * into, *self.space, dtype=self.dtype)
        return kernel, images

    def loss(self, kernel, images):
        numbers = lax.conv_dimension_numbers(images.shape, kernel.shape, self.layout)
        axes = range(images.ndim)
        out = lax.conv_general_dilated(
            jnp.moveaxis(images, axes, numbers.lhs_spec),
            jnp.moveaxis(kernel, axes, numbers.rhs_spec),
            self.strides,
            self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            feature_group_count=self.groups,
            dimension_numbers=numbers,
        )
        return jnp.square(out.astype("float32")).sum() / 2

    def reference(self, kernel, images):
        """Gradients of that in float64, by the definition of a convolution.

        For each axis a table, [window, taps, space], says which pixel a tap meets.
        """
        tables: list[Any] = []
        for k, (size, window) in enumerate(zip(self.space, self.window(), strict=True)):
            (low, _), first = self.padding[k], self.strides[k] * np.arange(window)
            taps = self.rhs_dilation[k] * np.arange(self.kernel[k])
            pixels = self.lhs_dilation[k] * np.arange(size)
            met = first[:, None, None] + taps[:, None] - low == pixels
            tables += [met.astype(np.float64), [10 + k, 20 + k, 30 + k]]
        record, n, group, into, out = range(5)
        p, k, y = (
            [start + axis for axis in range(len(self.space))] for start in (10, 20, 30)
        )
        of_images = [record, n, group, into, *y]
        of_kernel = [group, out, into, *k]
        of_outputs = [record, n, group, out, *p]
        x = np.asarray(images, np.float64)
        x = x.reshape(*x.shape[:2], self.groups, -1, *self.space)
        w = np.asarray(kernel, np.float64)
        w = w.reshape(self.groups, -1, *w.shape[1:])
        einsum = functools.partial(np.einsum, optimize=True)
        outputs = einsum(x, of_images, w, of_kernel, *tables, of_outputs)
        known = (outputs, of_outputs, *tables)
        by_kernel = einsum(x, of_images, *known, [record, *of_kernel])
        by_images = einsum(w, of_kernel, *known, of_images)
        shapes = (len(images), *kernel.shape), images.shape
        return by_kernel.reshape(shapes[0]), by_images.reshape(shapes[1])


def check(case: Case, formulations=FORMULATIONS):
    """Compares gradients of each record by each formulation with the reference."""
    gradient = jax.grad(case.loss, (0, 1))
    ours = {
        name: jax.vmap(fast_convolutions(gradient, formulation=name), (None, 0))
        for name in formulations
    }
    operands = case.operands()
    found = jax.jit(lambda *args: {name: f(*args) for name, f in ours.items()})(
        *operands
    )
    expected = [np.asarray(x, case.dtype) for x in case.reference(*operands)]
    tolerance = 2e-5 if case.dtype == jnp.float32 else 3e-2
    for name, gradients in found.items():
        assert_close(gradients, expected, tolerance, f"{name}: {case}")


CASES = {
    "padded": Case((7, 8), (2, 3)),
    "strided": Case((8, 9), (3, 2), (2, 3), layout=NCHW),
    "dilated": Case((7, 8), (3, 2), padding=((0, 2), (1, 0)), rhs_dilation=(1, 2)),
    "transposed": Case((4, 5), (3, 3), lhs_dilation=(2, 1)),
    "grouped": Case((6, 7), (2, 3), groups=2, channels=(2, 4), layout=NCHW),
    "depthwise": Case((6, 7), (3, 2), groups=4, channels=(1, 1)),
    "cropped": Case((7, 8), (3, 2), (2, 1), ((-1, 0), (-2, -1))),
    "narrow": Case((7, 8), (2, 2), (2, 2), dtype=jnp.bfloat16),
    "signals": Case((9,), (3,), (1,), ((1, 1),), (1,), (1,), layout=None),
    "patches": Case((18, 18), (9, 9), (9, 9), ((0, 0), (0, 0))),
}


@pytest.mark.sampled("padded", "strided")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_formulation_equals_the_definition(case):
    check(case, FORMULATIONS[1:])  # "auto" is one of these


@pytest.mark.sampled("padded", "strided")
@pytest.mark.usefixtures("as_on_accelerators")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_accelerators_compute_equals_the_definition(case):
    check(case, ("auto", "rows", "shifted"))  # of the others it is the same


# XLA's own convolutions of these are wrong on CPUs: openxla/xla#48713.
CROPPED_AND_PADDED = [
    Case((6, 5), (3, 3), (3, 2), ((-1, 1), (0, 0)), channels=(8, 8), layout=NCHW),
    Case((6, 5), (2, 2), (2, 2), ((0, 0), (-2, 1)), channels=(8, 2)),
]


@pytest.mark.proves("conv.fast_convolutions", 2)
@pytest.mark.parametrize("case", CROPPED_AND_PADDED)
def test_convolutions_that_crop_and_pad_read_their_images_alone(case):
    check(case, ("auto", "plain"))


@pytest.mark.slow
def test_every_formulation_equals_the_definition_of_random_convolutions():
    """Seeded; without the crop two of the first 40 are wrong on jax 0.10."""
    rng = np.random.default_rng(0)
    cases = [case for _ in range(120) if min((case := _random_case(rng)).window()) > 0]
    for case in cases:
        check(case)
    assert len(cases) > 45


def _random_case(rng) -> Case:
    rank = int(rng.choice([1, 2, 2, 2, 3]))
    into, out = map(int, rng.choice([1, 3, 8, 8], 2))

    def draws(*values):
        return [int(value) for value in rng.choice(values, rank)]

    return Case(
        space=draws(*range(1, 9)),
        kernel=draws(1, 2, 3, 3) if rank == 3 else draws(1, 2, 3, 3, 5),
        strides=draws(1, 1, 2, 3),
        padding=list(zip(draws(*range(-3, 4)), draws(*range(-3, 4)), strict=True)),
        rhs_dilation=draws(1, 1, 1, 2),
        lhs_dilation=draws(1, 1, 2) if rng.random() < 0.2 else [1] * rank,
        groups=int(rng.choice([1, 1, 2, 3])),
        channels=(into, out),
        layout=None
        if rng.random() < 0.5
        else lax.ConvDimensionNumbers(
            *(tuple(map(int, rng.permutation(rank + 2))) for _ in range(3))
        ),
        dtype=jnp.bfloat16 if rng.random() < 0.2 else jnp.float32,
    )


@functools.partial(jax.jit, static_argnames="groups")
def _once(kernel, x, *, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        feature_group_count=groups,
        dimension_numbers=NHWC,
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


@pytest.mark.sampled
def test_regions_change_no_number():
    kernels, images = 0.3 * draw(0, 5, 3, 3, 4, 4), draw(1, 3, 2, 6, 6, 4)
    found = per_record(_regions, "auto")(kernels, images)
    assert_close(found, loop(_regions, kernels, images))
    assert slow_convolutions(per_record(_regions, "plain"), kernels, images) >= 5
    assert slow_convolutions(per_record(_regions, "auto"), kernels, images) == 0


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["cnn", pytest.param("wrn", marks=pytest.mark.slow)])
def test_our_models_lose_their_grouped_convolutions(name):
    options = {"features": (8,)} if name == "cnn" else {"depth": 10, "width": 1}
    model = models.create(name, 3, **options)
    images = draw(1, 2, 2, 8, 8, 3)
    params = jax.jit(model.init)(jax.random.key(0), images[0])

    def loss(params, images):
        return jnp.square(model.apply(params, images)).sum()

    fast, plain = per_record(loss, "auto"), per_record(loss, "plain")
    assert slow_convolutions(plain, params, images) > 0
    assert slow_convolutions(fast, params, images) == 0
    assert_close(fast(params, images), loop(loss, params, images), 1e-4)


DEPTHWISE = Case((9, 8), (7, 7), padding=((3, 3), (3, 3)), groups=6, channels=(1, 1))


def lowered(case, formulation, platform):
    """The program of one platform, as JAX hands it to XLA."""
    traced = per_record(case.loss, formulation).trace(*case.operands())
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.sampled("case0-rows-batch_group", "case2-plain-plain")
@pytest.mark.parametrize(
    ("case", "on_cpu", "on_others"),
    [
        (CASES["padded"], "rows", "batch_group"),
        (CASES["dilated"], "rows", "batch_group"),
        (CASES["grouped"], "plain", "plain"),
        (DEPTHWISE, "shifted", "shifted"),  # of ConvNeXt
        (CASES["patches"], "plain", "plain"),  # as many taps as pixels
    ],
)
def test_auto_chooses_by_the_platform_that_is_compiled_for(case, on_cpu, on_others):
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        chosen = on_cpu if platform == "cpu" else on_others
        text = lowered(case, "auto", platform)
        assert text == lowered(case, chosen, platform)
        loops = text.count("stablehlo.while")
        assert loops == (platform == "cpu" and chosen in ("rows", "shifted"))
    assert "batch_group_count = 3" in lowered(CASES["padded"], "auto", "cuda")
    assert "stablehlo.while" not in lowered(CASES["padded"], "rows", "cuda")


def test_what_is_not_per_record_is_left_alone():
    """No vmap, or a vmap over one operand: the same equations as without us."""

    def forward(weights, images):
        return _once(weights, images).sum()

    weights, images = draw(0, 3, 3, 4, 4), draw(1, 5, 2, 6, 6, 4)
    batched = jax.vmap(forward, (None, 0))
    ours = jax.vmap(fast_convolutions(forward), (None, 0))
    texts = [str(jax.make_jaxpr(f)(weights, images)) for f in (batched, ours)]
    assert [text.count("conv_general_dilated[") for text in texts] == [1, 1]
    np.testing.assert_array_equal(ours(weights, images), batched(weights, images))
    one, same = (
        jax.jit(jax.grad(f)).lower(weights, images[0]).as_text()
        for f in (
            forward,
            lambda w, x: fast_convolutions(forward, formulation="plain")(w, x),
        )
    )
    assert one.count("convolution(") == same.count("convolution(") > 0


@pytest.mark.sampled
def test_without_the_extension_points_it_is_slow_and_right_or_refuses(monkeypatch):
    def broken(*args):
        raise AttributeError("no such thing in this version")

    monkeypatch.setattr(conv, "_interpret", broken)
    right = Case((5, 6), (3, 3))
    kernel, images = right.operands()
    with pytest.warns(UserWarning, match="per-record gradients are slow: Attribute"):
        found = per_record(right.loss, "auto")(kernel, images)
    assert_close(found, loop(right.loss, kernel, images))
    for wrong in (Case((5, 6), (3, 3), groups=2), CROPPED_AND_PADDED[0]):
        with pytest.raises(UserError, match="let one record change another's"):
            per_record(wrong.loss, "auto")(*wrong.operands())


def test_a_users_own_error_passes_through():
    def loss(weights):
        raise TypeError("theirs")

    with pytest.raises(TypeError, match="theirs"):
        fast_convolutions(jax.grad(loss))(jnp.ones(3))


def test_refuses():
    with pytest.raises(UserError, match="formulation is 'fft': it must be one of auto"):
        fast_convolutions(jnp.sin, formulation="fft")


@pytest.mark.sampled("False-1-4-3", "True-4-2-3")
@pytest.mark.proves("conv.fast_convolutions", 1)
@pytest.mark.parametrize(
    ("groups", "multiple", "kernel"),
    [(1, 4, 3), (4, 1, 3), (4, 2, 3), (1, 4, 9), (4, 1, 9)],
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_a_record_that_is_no_number_spoils_no_other(
    groups, multiple, kernel, accelerated, request
):
    """XLA's groups of one convolution do let NaN through: 0 x NaN is NaN."""

    if accelerated:
        request.getfixturevalue("as_on_accelerators")

    def loss(weights, images):
        return jnp.square(_once(weights, images, groups=groups)).sum()

    @jax.jit
    def gradients(weights, images):
        return {name: per_record(loss, name)(weights, images) for name in FORMULATIONS}

    weights = draw(0, kernel, kernel, 4 // groups, groups * multiple)
    images = draw(1, 6, 2, 9, 9, 4)
    expected = gradients(weights, images)
    others = np.arange(6) != 1
    for bad in (jnp.nan, jnp.inf):
        found = gradients(weights, images.at[1, 0, 2, 2].set(bad))
        for name in FORMULATIONS:
            np.testing.assert_array_equal(found[name][others], expected[name][others])
            assert not np.isfinite(found[name][1]).all()


@pytest.mark.sampled
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

    ours, theirs = (
        jax.jit(functools.partial(derivatives, wrap))()
        for wrap in (fast_convolutions, lambda function: function)
    )
    assert_close(ours, theirs)
