"""Evaluation of several weights at once, and over views of an image."""

import jax
import numpy as np
import pytest

from dpmix_jax import AugmentationConfig, views
from dpmix_jax.run.evaluate import make_confusion, over_views
from dpmix_jax.sampling import stream_key
from tests import toy

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


def test_of_views_that_are_the_image_it_is_the_prediction():
    same = AugmentationConfig(flip=False, max_shift=0.0)
    found = averaged(toy.init_params(), same)
    expected = jax.nn.log_softmax(toy.logits_fn(toy.init_params(), IMAGES))
    np.testing.assert_allclose(found, expected, atol=1e-6)
