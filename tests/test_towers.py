"""The image towers against open_clip's, and what both have in common."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpmix_jax import fast_convolutions, models
from tests import towers

SMALL = {
    "vit": {**towers.OPTIONS["vit"], "depth": 1},
    "convnext": {"depths": (1, 1), "features": (4, 8), "embedding_size": 8},
}
both = pytest.mark.parametrize("tower", ["vit", "convnext"])


@pytest.mark.sampled
@both
def test_it_computes_what_open_clip_does(tower):
    """Embeddings and a gradient of a tiny tower with the same weights."""
    path = towers.FIXTURES / f"{tower}.safetensors"
    expected = safetensors.numpy.load_file(path)
    towers.assert_parity(tower, path, expected, **towers.OPTIONS[tower])


@pytest.mark.sampled
def test_the_head_is_linear_in_the_embedding():
    module = models.create("vit", 5, **SMALL["vit"])
    params = towers.draw_params(module, (16, 16))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    @jax.jit
    def compute(params):
        alone = {"params": {"encoder": params["encoder"]}}
        embedding = module.apply(alone, images, method=lambda m, x: m.encoder(x))
        return embedding, module.apply({"params": params}, images)

    embedding, logits = compute(params)
    assert float(jnp.abs(embedding[0] - embedding[1]).max()) > 0.01
    expected = np.asarray(embedding) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert module.CPU_IMAGES == 2
    assert models.create("convnext", 5).CPU_IMAGES is None


@pytest.mark.sampled("vit")
@both
def test_bfloat16_computes_in_half_and_keeps_float32_outside(tower):
    module = models.create(tower, 5, dtype=jnp.bfloat16, **SMALL[tower])
    params = {"params": towers.draw_params(module, (16, 16))}
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    def loss(params):
        return module.apply(params, images).sum()

    shapes = jax.eval_shape(jax.grad(loss), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    products = re.findall(
        r":(\w+)\[[^\n]*(?:dot_general|conv_general_dilated)\[",
        str(jax.make_jaxpr(module.apply)(params, images)),
    )
    assert products.count("f32") == 1  # of the head
    assert products.count("bf16") == len(products) - 1 >= 6
    full = models.create(tower, 5, **SMALL[tower])
    exact, half = jax.jit(lambda: [m.apply(params, images) for m in (full, module)])()
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, exact, atol=0.05 * float(jnp.abs(exact).max()))


def drawn_loss(tower):
    """Returns a loss of a small tower, parameters, and images of two records."""
    module = models.create(tower, 5, **SMALL[tower])
    images = jax.random.normal(jax.random.key(0), (2, 2, 12, 8, 3))
    params = {"params": towers.draw_params(module, (12, 8))}

    def loss(params, images):
        return jnp.square(module.apply(params, images)).sum()

    return loss, params, images


def test_gradients_of_records_of_vit_are_plain_products():
    """Under vmap over records no convolution is left, which would be slow."""
    loss, params, images = drawn_loss("vit")
    each = jax.vmap(jax.grad(loss), (None, 0))
    assert "conv_general_dilated" not in str(jax.make_jaxpr(each)(params, images))


@pytest.mark.slow
def test_gradients_of_records_of_convnext_equal_a_loop():
    loss, params, images = drawn_loss("convnext")
    each = jax.vmap(fast_convolutions(jax.grad(loss)), (None, 0))
    found, one = jax.jit(each)(params, images), jax.jit(jax.grad(loss))
    for index, image in enumerate(images):
        expected = jax.tree.leaves(one(params, image))
        for a, b in zip(jax.tree.leaves(found), expected, strict=True):
            scale = max(float(np.abs(b).max()), 1e-3)
            np.testing.assert_allclose(a[index], b, atol=1e-4 * scale)


@pytest.mark.sampled
def test_convnext_starts_as_its_source_says():
    """Kernels: normal of deviation 0.02; factors of blocks 1e-6; biases and head 0."""
    module = models.create("convnext", 5, depths=(0, 1), features=(32, 32))
    init = jax.jit(module.init)
    params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    block = params["encoder"]["stage_1_0"]
    for layer in (block["fc1"], block["fc2"], block["conv"]):
        assert float(layer["kernel"].std()) == pytest.approx(0.02, rel=0.1)
        np.testing.assert_array_equal(layer["bias"], 0.0)
    np.testing.assert_array_equal(block["gamma"], np.float32(1e-6))
    np.testing.assert_array_equal(params["head"]["kernel"], np.zeros((640, 5)))


@pytest.mark.parametrize(
    ("tower", "options", "size", "message"),
    [
        ("vit", {}, (8, 10), "patch_size is 4: it must divide images of 8x10"),
        ("vit", {"heads": 3}, (8, 8), "heads is 3: it must divide the width, 16"),
        ("convnext", {}, (31, 64), "are 31x64 pixels: they must be at least 32x32"),
        ("convnext", {"depths": (1,)}, (32, 32), r"depths is \(1,\): it must have one"),
    ],
)
def test_bad_options_are_refused(tower, options, size, message):
    module = models.create(tower, 5, **{**towers.OPTIONS[tower], **options})
    with pytest.raises(ValueError, match=message):
        towers.encoder_shapes(module, size)
