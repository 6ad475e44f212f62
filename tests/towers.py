"""Towers of `tests/make_towers.py` as tests use them."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
LIBRARIES = {
    "vit": ("open_clip", "transformers", "timm"),
    "convnext": ("open_clip", "timm"),
}
BOTH = [(tower, library) for tower in LIBRARIES for library in LIBRARIES[tower]]


@functools.cache
def archive() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "towers.npz") as file:
        return dict(file)


def fixture(tower: str, library: str) -> dict[str, np.ndarray]:
    """Returns what the archive has of a tiny tower."""
    prefix = f"{tower}/{library}/"
    return {
        key.removeprefix(prefix): value
        for key, value in archive().items()
        if key.startswith(prefix)
    }


def state(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the state dict in a fixture."""
    return {
        key.removeprefix("state/"): value
        for key, value in found.items()
        if key.startswith("state/")
    }


def shapes(tower: str, library: str) -> dict[str, tuple[int, ...]]:
    """Returns keys and shapes of a tower at full size."""
    content = json.loads((FIXTURES / "towers.json").read_text())
    return {key: tuple(shape) for key, shape in content[tower][library].items()}


def encoder_shapes(module, size: tuple[int, int]):
    """Returns the shapes of an encoder's parameters, for images of a size."""
    blank = jnp.zeros((1, *size, 3))
    return jax.eval_shape(module.init, jax.random.key(0), blank)["params"]["encoder"]


def draw_params(module, size: tuple[int, int], seed: int = 0):
    """Draws parameters of order one, without the time that compiling `init` takes."""
    blank = jnp.zeros((1, *size, 3))
    shapes = jax.eval_shape(module.init, jax.random.key(0), blank)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes
    )


def assert_parity(tower: str, found: dict[str, np.ndarray], folder, **options) -> float:
    """Compares a tower with its own weights: outputs and gradients, to 1e-5.

    Args:
      tower: of `models.REGISTRY`.
      found: see `make_towers`.
      folder: to write weights into.
      **options: of the model.

    Returns:
      The largest difference, relative to the largest value where that is above 1.
    """
    module = models.create(tower, found["logits"].shape[-1], **options)
    path = folder / "weights.safetensors"
    weights = {key: np.ascontiguousarray(v) for key, v in state(found).items()}
    safetensors.numpy.save_file(weights, path)
    size = found["images"].shape[1:3]
    head = {"kernel": found["head/weight"].T, "bias": found["head/bias"]}
    params = {
        "encoder": load_encoder(path, encoder_shapes(module, size)),
        "head": head,
    }
    mean, stddev = (
        np.array(c, np.float32) for c in (images.CLIP_MEAN, images.CLIP_STDDEV)
    )
    pixels = (found["images"].astype(np.float32) / np.float32(255.0) - mean) / stddev

    def loss(params):
        embedding = module.apply({"params": params}, pixels, method="encode")
        logits = module.apply({"params": params}, pixels)
        labels = found["labels"].astype(np.int32)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return each.mean(), (embedding, logits)

    gradients, (embedding, logits) = jax.jit(jax.grad(loss, has_aux=True))(params)
    first = {"vit": "patches", "convnext": "stem"}[tower]
    compared = {
        "embedding": embedding,
        "logits": logits,
        "gradient/head/weight": gradients["head"]["kernel"].T,
        "gradient/head/bias": gradients["head"]["bias"],
        "gradient/first": jnp.transpose(
            gradients["encoder"][first]["kernel"], (3, 2, 0, 1)
        ),
    }
    worst = 0.0
    for key, value in compared.items():
        largest = max(np.abs(found[key]).max(), 1.0)
        difference = np.abs(np.asarray(value) - found[key]).max() / largest
        assert difference <= 1e-5, f"{key} differs by {difference}"
        worst = max(worst, float(difference))
    return worst
