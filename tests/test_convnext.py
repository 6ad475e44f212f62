"""ConvNeXt against open_clip's and timm's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import fast_convolutions, models
from tests import towers

TINY = towers.OPTIONS["convnext"]


@pytest.mark.parametrize("library", towers.LIBRARIES["convnext"])
def test_it_computes_what_other_libraries_do(library, tmp_path):
    found = towers.fixture("convnext", library)
    towers.assert_parity("convnext", found, tmp_path, **TINY)


def test_it_starts_as_its_source_says():
    """Kernels: normal of deviation 0.02; factors of blocks 1e-6; biases 0."""
    module = models.create("convnext", 5, depths=(0, 1), features=(32, 32))
    init = jax.jit(module.init)
    params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    block = params["encoder"]["stage_1_0"]
    for layer in (block["fc1"], block["fc2"], block["conv"]):
        assert float(layer["kernel"].std()) == pytest.approx(0.02, rel=0.1)
        np.testing.assert_array_equal(layer["bias"], 0.0)
    np.testing.assert_array_equal(block["gamma"], np.float32(1e-6))


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, (31, 64), "images are 31x64 pixels: they must be at least 32x32"),
        ({"depths": (1, 1)}, (32, 32), r"depths is \(1, 1\): it must have one value"),
    ],
)
def test_bad_options_are_refused(options, size, message):
    module = models.create("convnext", 5, **{**TINY, **options})
    with pytest.raises(ValueError, match=message):
        towers.encoder_shapes(module, size)


def test_gradients_of_records_equal_a_loop():
    module = models.create("convnext", 5, depths=(1, 1), features=(4, 8))
    images = jax.random.normal(jax.random.key(0), (2, 2, 10, 8, 3))
    params = {"params": towers.draw_params(module, (10, 8))}

    def loss(params, images):
        return jnp.square(module.apply(params, images)).sum()

    gradient = jax.jit(jax.grad(loss))
    found = jax.jit(jax.vmap(fast_convolutions(jax.grad(loss)), (None, 0)))
    found = found(params, images)
    for index, image in enumerate(images):
        one = gradient(params, image)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
            scale = max(float(np.abs(b).max()), 1e-3)
            np.testing.assert_allclose(a[index], b, atol=1e-4 * scale)
