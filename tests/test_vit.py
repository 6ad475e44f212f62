"""The vision transformer against open_clip's, transformers' and timm's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import models
from tests import towers

TINY = towers.OPTIONS["vit"]
SMALL = {
    "vit": {**TINY, "depth": 1},
    "convnext": {
        "depths": (1, 1),
        "features": (4, 8),
        "embedding_size": 8,
    },
}


@pytest.mark.parametrize("library", towers.LIBRARIES["vit"])
def test_it_computes_what_other_libraries_do(library, tmp_path):
    towers.assert_parity("vit", towers.fixture("vit", library), tmp_path, **TINY)


@pytest.mark.parametrize("tower", ["vit", "convnext"])
def test_numbers_of_parameters(tower):
    """open_clip's image towers have 86,192,640 and 88,221,824."""
    size = {"vit": 224, "convnext": 256}[tower]
    shapes = towers.encoder_shapes(models.create(tower, 10), (size, size))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == {"vit": 86_192_640, "convnext": 88_221_824}[tower]


@pytest.mark.parametrize("tower", ["vit", "convnext"])
def test_encoder_and_head_are_apart(tower):
    """The encoder can be applied without a head, whose kernel starts at 0."""
    module, images = models.create(tower, 5, **SMALL[tower]), jnp.ones((1, 16, 16, 3))
    starts = jax.jit(module.init)(jax.random.key(0), images)["params"]["head"]
    np.testing.assert_array_equal(starts["kernel"], np.zeros((8, 5)))
    np.testing.assert_array_equal(starts["bias"], np.zeros(5))
    params = towers.draw_params(module, (16, 16))
    assert set(params) == {"encoder", "head"}
    alone = {"params": {"encoder": params["encoder"]}}
    bare = models.create(tower, None, **SMALL[tower])

    @jax.jit
    def compute(images):
        logits = module.apply({"params": params}, images)
        embedding = module.apply(alone, images, method="encode")
        return logits, embedding, bare.apply(alone, images)

    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    logits, embedding, same = compute(images)
    assert float(jnp.abs(embedding[0] - embedding[1]).max()) > 0.01
    np.testing.assert_array_equal(embedding, same)
    head = params["head"]
    expected = np.asarray(embedding) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tower", ["vit", "convnext"])
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


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, (8, 10), "patch_size is 4: it must divide images of 8x10"),
        ({"heads": 3}, (8, 8), "heads is 3: it must divide the width, 16"),
    ],
)
def test_bad_options_are_refused(options, size, message):
    module = models.create("vit", 5, **{**TINY, **options})
    with pytest.raises(ValueError, match=message):
        towers.encoder_shapes(module, size)


def test_gradients_of_records_are_plain_products():
    """Under vmap over records no convolution is left, which would be slow."""
    module = models.create("vit", 5, **SMALL["vit"])
    images = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 3))
    params = {"params": towers.draw_params(module, (8, 8))}

    def loss(params, images):
        return jnp.square(module.apply(params, images)).sum()

    each = jax.vmap(jax.grad(loss), (None, 0))
    assert "conv_general_dilated" not in str(jax.make_jaxpr(each)(params, images))
    found, gradient = jax.jit(each)(params, images), jax.jit(jax.grad(loss))
    for index, image in enumerate(images):
        one = gradient(params, image)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
            scale = max(float(np.abs(b).max()), 1e-3)
            np.testing.assert_allclose(a[index], b, atol=1e-4 * scale)
