"""A private linear classifier without training: least squares of scattering."""

import jax.numpy as jnp
from loop import accuracy, digits

import dpmix_jax as dpm
from dpmix_jax import models
from dpmix_jax.baselines import least_squares

# An encoder without weights and without data: the wavelet scattering transform.
encoder = models.create("scattering_linear", num_classes=None)


def features(images):  # [n, 8, 8, 1] -> [n, 324], each of its image alone, of norm 1
    found = encoder.apply({}, images).reshape(len(images), -1)
    return found / jnp.linalg.norm(found, axis=1, keepdims=True)


images, labels, test_images, test_labels = digits()
seed = 1234  # from `secrets` if the model is to be released
for epsilon in (1.0, 3.0, 8.0):  # each for itself: who releases all spends their sum
    mechanism = dpm.calibrate(
        epsilon=epsilon, delta=1e-5, sampling_prob=1.0, num_updates=1
    )
    weights = least_squares.fit(
        features(images),
        labels,
        l2_clip_norm=1.0,
        mechanism=mechanism,
        key=dpm.noise_key(seed + int(epsilon)),
    )
    print(f"({mechanism.epsilon(1e-5):.3f}, 1e-05)-DP")
    print(accuracy(features(test_images) @ weights, test_labels))
