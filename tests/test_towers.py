"""What both image towers have in common."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import models
from tests import towers

SMALL = {
    "vit": {**towers.OPTIONS["vit"], "depth": 1},
    "convnext": {
        "depths": (1, 1),
        "features": (4, 8),
        "embedding_size": 8,
    },
}


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
