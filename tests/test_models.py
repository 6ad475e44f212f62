"""Models against independent definitions of them, with the same weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import UserError, models
from dpmix_jax.models.layers import GroupNorm, max_pool
from tests import towers


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_group_norm_is_that_of_flax(dtype):
    """Output and gradients, in float32 and bfloat16."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = (1.0 + 3.0 * jax.random.normal(keys[0], (2, 5, 4, 12))).astype(dtype)
    scale, bias = (jax.random.normal(key, (12,)) for key in keys[1:3])
    params = {"params": {"scale": scale, "bias": bias}}
    weights = jax.random.normal(keys[3], x.shape)

    def value_and_gradients(module, read):
        def loss(params, x):
            out = module.apply(params, x.astype(read))
            assert out.dtype == module.dtype
            return jnp.sum(out.astype(jnp.float32) * weights)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)

    ours = value_and_gradients(GroupNorm(4, dtype=dtype), dtype)
    flax = nn.GroupNorm(4, epsilon=1e-5, dtype=jnp.float32)
    theirs = value_and_gradients(flax, jnp.float32)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_group_norm_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match=r"groups \(4\) does not divide"):
        GroupNorm(4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))


def test_images_are_not_pooled_to_nothing():
    model = models.create("cnn", 10, features=(8,) * 5)
    with pytest.raises(
        UserError, match=r"images to pool is \(1, 1\): it must be at le"
    ):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


@pytest.mark.sampled
@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (2, 7, 5, 3)])
def test_max_pool_is_that_of_flax(shape):
    x, weights = jax.random.normal(jax.random.key(0), (2, *shape))

    def value_and_gradient(pool):
        def loss(x):
            out = pool(x)
            return (out * weights[:, : out.shape[1], : out.shape[2]]).sum(), out

        return jax.value_and_grad(loss, has_aux=True)(x)

    flax = value_and_gradient(lambda x: nn.max_pool(x, (2, 2), (2, 2)))
    jax.tree.map(np.testing.assert_array_equal, value_and_gradient(max_pool), flax)


@pytest.mark.sampled
def test_a_strided_cnn_is_its_definition():
    """Of the first layer every second pixel of what stride 1 computes, and no pool."""
    images = jax.random.normal(jax.random.key(0), (2, 8, 6, 1))
    net = models.create("cnn", 3, features=(4,), groups=2, strided=True)
    params = net.init(jax.random.key(1), images)["params"]
    full = nn.Conv(4, (3, 3), use_bias=False).apply(
        {"params": params["Conv_0"]}, jnp.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)))
    )
    first = {"params": params["GroupNorm_0"]}
    x = nn.relu(GroupNorm(2).apply(first, full[:, 1:-1:2, 1:-1:2]))
    expected = nn.Dense(3).apply({"params": params["Dense_0"]}, x.reshape(2, -1))
    found = net.apply({"params": params}, images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    deeper = models.create("cnn", 3, features=(4, 8), groups=2, strided=True)
    shapes = jax.eval_shape(deeper.init, jax.random.key(1), images)["params"]
    assert shapes["Dense_0"]["kernel"].shape == (2 * 2 * 8, 3)


def convolve(x, weight, stride):
    """[C, H, W] with [h, w, C, O], padded as SAME: sums written out, in float64."""
    side = weight.shape[0]
    out = -(-x.shape[1] // stride)
    pad = max((out - 1) * stride + side - x.shape[1], 0)
    x = np.pad(x, ((0, 0), *[(pad // 2, pad - pad // 2)] * 2))
    rows = range(0, out * stride, stride)
    patches = [[x[:, i : i + side, j : j + side] for j in rows] for i in rows]
    return np.einsum("ijchw,hwco->oij", np.array(patches), weight)


def plain_wrn(params, image, blocks, order):
    """WRN of De et al. (2022), Appendix C, for one [H, W, C] image, in NumPy."""
    taken = {"WSConv": 0, "GroupNorm": 0, "Dense": 0}

    def layer(kind):
        found = params[f"{kind}_{taken[kind]}"]
        taken[kind] += 1
        return {name: np.float64(value) for name, value in found.items()}

    def conv(x, stride=1):
        p = layer("WSConv")
        kernel = p["kernel"]
        fan_in = np.prod(kernel.shape[:3])
        mean, variance = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
        kernel = (
            p["gain"] * (kernel - mean) / np.sqrt(np.maximum(fan_in * variance, 1e-4))
        )
        return convolve(x, kernel, stride) + p["bias"][:, None, None]

    def norm(x):
        p = layer("GroupNorm")
        groups = x.reshape(16, -1)
        centred = groups - groups.mean(1, keepdims=True)
        x = (centred / np.sqrt(groups.var(1, keepdims=True) + 1e-5)).reshape(x.shape)
        return x * p["scale"][:, None, None] + p["bias"][:, None, None]

    def relu(x):
        return np.maximum(x, 0.0)

    x = conv(np.moveaxis(np.float64(image), -1, 0))
    for stage in range(3):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            shortcut = x
            if block == 0 and order == 0:
                shortcut = conv(norm(relu(x)), stride)
            elif block == 0:
                shortcut = relu(norm(conv(x, stride)))
            x = conv(norm(relu(x)), stride)
            x = conv(norm(relu(x))) + shortcut
    dense = layer("Dense")
    return norm(relu(x)).mean((1, 2)) @ dense["kernel"] + dense["bias"]


@pytest.mark.sampled("0")
@pytest.mark.parametrize("order", [0, 3])
def test_wrn_is_that_of_the_paper(order):
    """Logits of WRN-16-1 equal those of loops in NumPy, whatever the weights."""
    model = models.create("wrn", 5, depth=16, width=1, order=order)
    image = np.random.default_rng(0).standard_normal((9, 9, 3)).astype(np.float32)
    params = towers.draw_params(model, image.shape[:2])
    with jax.default_matmul_precision("float32"):
        found = jax.jit(model.apply)({"params": params}, image[None])[0]
    expected = plain_wrn(params, image, 2, order)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.sampled
def test_wrn_starts_as_its_source_says():
    """Kernels: truncated normal of variance 1 / fan-in; gains 1, biases 0."""
    model = models.create("wrn", 10, depth=10, width=4)
    image = jnp.zeros((1, 8, 8, 3), jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), image)["params"]
    for name, layer in params.items():
        kernel = layer.get("kernel")
        if kernel is not None and kernel.size > 10_000:
            fan_in = np.prod(kernel.shape[:-1])
            assert float(kernel.std()) == pytest.approx(fan_in**-0.5, rel=0.03), name
            bound = 2.0 / 0.87962566 * fan_in**-0.5  # two of the untruncated
            assert float(jnp.abs(kernel).max()) <= bound * 1.0001
        for ones in {"gain", "scale"} & {*layer}:
            np.testing.assert_array_equal(layer[ones], 1.0)
        np.testing.assert_array_equal(layer["bias"], 0.0)
