"""A Flax model as pure functions of its parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import UserError, models
from dpmix_jax.models.classifier import make_classifier


class Normalized(nn.Module):
    """What most image models do."""

    num_classes: int
    dtype: type

    @nn.compact
    def __call__(self, images):
        x = nn.BatchNorm(use_running_average=False)(images)
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


class Coupled(nn.Module):
    """An encoder that lets images see the mean of all."""

    num_classes: int
    dtype: type
    CPU_IMAGES = 3

    def setup(self):
        self.head = nn.Dense(self.num_classes)

    def encoder(self, images):
        return images.mean((1, 2)) - images.mean((0, 1, 2))[None]

    def whiten(self, embeddings):
        return embeddings + embeddings.sum(0)[None]

    def __call__(self, images):
        return self.head(self.whiten(self.encoder(images)))


def classifier(monkeypatch, module):
    monkeypatch.setitem(models.REGISTRY, "new", module)
    return make_classifier("new", {}, image_shape=(4, 4, 2), num_classes=3)


class Named(nn.Module):
    """Has an option by the name of a part that other models have."""

    num_classes: int
    dtype: type
    encoder: str = "small"
    whiten: bool = False

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.num_classes)(images.mean((1, 2)))


def test_an_option_by_the_name_of_encoder_is_no_encoder(monkeypatch):
    assert classifier(monkeypatch, Named).encode is None


def test_batch_statistics_are_refused(monkeypatch):
    with pytest.raises(UserError, match="keeps batch_stats: statistics of a batch mix"):
        classifier(monkeypatch, Normalized)


@pytest.mark.sampled("False-2")
@pytest.mark.proves("models.finetune.on_embeddings", 1)
@pytest.mark.parametrize("num", [2, 3, 7])
@pytest.mark.parametrize("accelerated", [False, True])
def test_an_embedding_is_of_its_image_alone(monkeypatch, num, accelerated, request):
    """Even if the model would have it otherwise: it sees one image at a time."""
    if accelerated:
        request.getfixturevalue("as_on_accelerators")
    model = classifier(monkeypatch, Coupled)
    images = jax.random.normal(jax.random.key(0), (num, 4, 4, 2))
    params = model.init(jax.random.key(1))
    assert model.cpu_images == 3
    np.testing.assert_array_equal(model.encode(params, images), np.zeros((num, 2)))
    others = model.encode(params, images.at[1].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(others[:, 0]), np.arange(num) == 1)
    of_one = model.logits(params, images[:1])
    np.testing.assert_allclose(
        model.classify(params, model.encode(params, images[:1])), of_one, atol=1e-6
    )


def test_only_cpus_embed_in_chunks(monkeypatch):
    model = classifier(monkeypatch, Coupled)
    params, images = model.init(jax.random.key(1)), jnp.zeros((7, 4, 4, 2))
    traced = jax.jit(model.encode).trace(params, images)
    for platform, loops in {"cpu": 1, "cuda": 0, "tpu": 0}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.while") == loops
