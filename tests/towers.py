"""The image towers of `tests/make_towers.py` as tests use them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dpmix_jax import models
from dpmix_jax.data import images
from dpmix_jax.models.pretrained import load_encoder

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
OPTIONS = {
    "vit": {"patch_size": 4, "width": 16, "depth": 2, "heads": 2, "embedding_size": 8},
    "convnext": {
        "depths": (1, 1, 2, 1),
        "features": (4, 8, 8, 12),
        "embedding_size": 8,
    },
}


def weights(tower: str) -> dict[str, np.ndarray]:
    """Returns the state dict of a tiny tower as open_clip names it."""
    found = safetensors.numpy.load_file(FIXTURES / f"{tower}.safetensors")
    return {key: value for key, value in found.items() if key.startswith("visual.")}


def full_shapes(tower: str) -> dict[str, tuple[int, ...]]:
    """Returns keys and shapes of open_clip's tower at full size."""
    content = json.loads((FIXTURES / "towers.json").read_text())
    return {key: tuple(shape) for key, shape in content[tower].items()}


def encoder_shapes(module, size: tuple[int, int]):
    """Returns the shapes of an encoder's parameters, for images of a size."""
    blank = jnp.zeros((1, *size, 3))
    return jax.eval_shape(module.init, jax.random.key(0), blank)["params"]["encoder"]


def draw_params(module, size: tuple[int, int], seed: int = 0):
    """Draws parameters, scales about 1; faster than to compile `init`."""
    blank = jnp.zeros((1, *size, 3))
    shapes = jax.eval_shape(module.init, jax.random.key(0), blank)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        about = np.float32(path[-1].key in ("gain", "scale"))
        return about + np.float32(0.3) * rng.standard_normal(leaf.shape, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_parity(tower: str, path: pathlib.Path, expected, **options) -> None:
    """Compares a tower with open_clip's: embeddings and a gradient, to 1e-5.

    Args:
      tower: of `models.REGISTRY`.
      path: of its weights.
      expected: see `make_towers.results`.
      **options: of the model.
    """
    module = models.create(tower, None, **options)
    pixels = expected["images"].astype(np.float32) / np.float32(255.0)
    pixels = (pixels - np.float32(images.CLIP_MEAN)) / np.float32(images.CLIP_STDDEV)
    params = load_encoder(path, encoder_shapes(module, pixels.shape[1:3]))

    def loss(params):
        embedding = module.apply({"params": {"encoder": params}}, pixels)
        return jnp.sum(embedding * expected["direction"]), embedding

    gradient, embedding = jax.jit(jax.grad(loss, has_aux=True))(params)
    kernel = gradient[{"vit": "patches", "convnext": "stem"}[tower]]["kernel"]
    for found, key in (
        (embedding, "embedding"),
        (jnp.transpose(kernel, (3, 2, 0, 1)), "gradient"),
    ):
        scale = max(np.abs(expected[key]).max(), 1.0)
        np.testing.assert_allclose(found, expected[key], rtol=0, atol=1e-5 * scale)
