"""Predictions averaged over views of an image."""

import jax
import numpy as np
import pytest

from dpmix_jax import AugmentationConfig, views
from dpmix_jax.run.evaluate import averaged_over_views
from dpmix_jax.sampling import stream_key
from tests import toy

V = 3
IMAGES = toy.records(4).normalize(toy.records(4).images)


@pytest.mark.sampled
def test_probabilities_are_those_of_a_loop_over_images_and_views():
    shifted = AugmentationConfig(max_shift=2.0)
    params = toy.init_params()
    found = jax.jit(averaged_over_views(toy.logits_fn, V, shifted))(params, IMAGES)
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
    found = averaged_over_views(toy.logits_fn, V, same)(toy.init_params(), IMAGES)
    expected = jax.nn.log_softmax(toy.logits_fn(toy.init_params(), IMAGES))
    np.testing.assert_allclose(found, expected, atol=1e-6)
