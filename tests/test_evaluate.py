"""Evaluation of several weights at once, and over views of an image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import AugmentationConfig, data, views
from dpmix_jax.models import finetune
from dpmix_jax.run import build
from dpmix_jax.run.evaluate import make_confusion, make_confusions, over_views
from dpmix_jax.sampling import stream_key
from tests import toy
from tests.test_finetune import SHORT, VIT_FLAGS, load

V = 3
IMAGES = toy.records(4).normalize(toy.records(4).images)


def averaged(params, augmentation):
    """Log probabilities of IMAGES over V views by the toy classifier."""
    functions = over_views(lambda _, images: images, toy.logits_fn, V, augmentation)
    encode, classify = map(jax.jit, functions)
    return classify(params, encode(params, IMAGES))


def test_models_of_one_encoder_share_embeddings_and_not_the_rest():
    """Counts are those of a loop over models and records; each is encoded once."""
    records, batch, seen = toy.records(11), 4, []
    models = [toy.init_params(seed) for seed in range(3)]
    models[2] |= {"dense": models[2]["dense"].at[0, 0].set(np.nan)}

    def encode(params, images):
        del params
        seen.append(len(images))
        return 2 * images

    def classify(params, embeddings):
        return toy.logits_fn(params, embeddings / 2)

    with jax.disable_jit():
        found = make_confusion(encode, classify, records, batch_size=batch)(models)
    assert seen == [batch] * 3
    expected = np.zeros_like(found)
    for counts, params in zip(expected, models, strict=True):
        for image, label in zip(records.images, records.labels, strict=True):
            logits = toy.logits_fn(params, records.normalize(image[None]))[0]
            counts[label, logits.argmax() if np.isfinite(logits).all() else -1] += 1
    np.testing.assert_array_equal(found, expected)
    assert (found.sum((1, 2)) == len(records)).all()
    assert found[2, :, -1].sum() == len(records)
    assert (found[0] != found[1]).any()


@pytest.mark.sampled
def test_probabilities_are_those_of_a_loop_over_images_and_views():
    shifted = AugmentationConfig(max_shift=2.0)
    params = toy.init_params()
    found = averaged(params, shifted)
    draw = jax.jit(lambda key, image: views(key, image, V, augmentation=shifted))
    logits = jax.jit(toy.logits_fn)
    keys = jax.random.split(stream_key(0, "augmentation"), len(IMAGES))
    for key, image, logs in zip(keys, IMAGES, found, strict=True):
        each = [logits(params, view[None])[0] for view in draw(key, image)]
        expected = np.mean([jax.nn.softmax(x) for x in each], axis=0)
        np.testing.assert_allclose(np.exp(logs), expected, rtol=1e-5)
        assert np.ptp(each, axis=0).max() > 1e-3  # the views do differ


@pytest.mark.sampled("all-1", "head-2")
@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("trainable", ["head", "head,bias", "all"])
def test_weights_share_an_encoder_only_where_it_is_frozen(trainable, num_views):
    """Counts of raw and averaged weights are those of the whole model of each."""
    changes = {"finetune.trainable": trainable, "evaluate.views": num_views}
    config = load("configs/vit_b16.py", SHORT | VIT_FLAGS | changes)
    dataset = data.load(config.data)
    dataset = dataset._replace(test=dataset.test.subset(np.arange(40)))
    model = build.classifier(config, dataset.test)
    rng = np.random.default_rng(0)

    def drawn():
        return jax.tree.map(
            lambda leaf: leaf + rng.normal(0, 0.5, leaf.shape).astype(np.float32),
            config.finetune.split(model.init(jax.random.key(0))),
        )

    _, frozen = drawn()
    weights = [finetune.join(drawn()[0], frozen) for _ in range(2)]
    images = dataset.test.normalize(jnp.asarray(dataset.test.images))
    logits_fn = jax.jit(model.logits)
    for params in weights:  # so that images are of several classes to each
        params["params"]["head"]["bias"] -= logits_fn(params, images).mean(0)
    name = "test_views" if num_views > 1 else "test"
    found = make_confusions(config, model, dataset)[name](weights)
    of_each = [images]
    if num_views > 1:
        keys = jax.random.split(stream_key(0, "augmentation"), len(images))
        draw = functools.partial(views, k=num_views, augmentation=config.augmentation)
        of_each = jnp.moveaxis(jax.vmap(draw)(keys, images), 1, 0)
    for counts, params in zip(found, weights, strict=True):
        expected = np.zeros_like(counts)
        likely = sum(jax.nn.softmax(logits_fn(params, view)) for view in of_each)
        np.add.at(expected, (dataset.test.labels, likely.argmax(1)), 1)
        np.testing.assert_array_equal(counts, expected)
    assert (found.sum(1) > 0).sum() > 6


def test_of_views_that_are_the_image_it_is_the_prediction():
    same = AugmentationConfig(flip=False, max_shift=0.0)
    found = averaged(toy.init_params(), same)
    expected = jax.nn.log_softmax(toy.logits_fn(toy.init_params(), IMAGES))
    np.testing.assert_allclose(found, expected, atol=1e-6)
