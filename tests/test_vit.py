"""The vision transformer against open_clip's, transformers' and timm's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import models
from tests import towers

TINY = towers.OPTIONS["vit"]


@pytest.mark.parametrize("library", towers.LIBRARIES["vit"])
def test_it_computes_what_other_libraries_do(library, tmp_path):
    towers.assert_parity("vit", towers.fixture("vit", library), tmp_path, **TINY)


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
    module = models.create("vit", 5, **{**TINY, "depth": 1})
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
