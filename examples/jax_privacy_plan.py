"""DP-Mix under a plan of jax_privacy: its batches, its banded noise, our gradients.

The plan is DP-BandMF (Choquette-Choo et al., 2023): noise that is correlated between
updates, so that part of it cancels. Its clipped gradients are replaced by ours. For
experiments: its noise has a seed of 32 bits, and is drawn as floats.
"""

import jax
import jax.numpy as jnp
import optax
from jax_privacy.experimental import execution_plan
from loop import AUGMENTATION, METHOD, accuracy, digits

import dpmix_jax as dpm

images, labels, test_images, test_labels = digits()
seed, num_bands, num_updates, q = 1234, 2, 60, 0.3
config = execution_plan.BandMFExecutionPlanConfig.default(
    num_bands=num_bands,
    iterations=num_updates,
    epsilon=3.0,
    delta=1e-5,
    sampling_prob=q,
    noise_seed=seed,
)
plan, batch_size = config.plan, q * len(images) / num_bands


def loss_fn(params, images, labels):
    logits = images.reshape(len(images), -1) @ params
    return optax.softmax_cross_entropy(logits, labels).mean()


gradient_fn = dpm.clipped_gradient(loss_fn, l2_clip_norm=1.0)
relation = config.accountant.neighboring_relation
theirs = plan.clipped_grad(lambda params, x: params @ x)
assert gradient_fn.sensitivity(relation) == theirs.sensitivity(relation)
record_set = dpm.augmentation_set(METHOD, AUGMENTATION)


@jax.jit
def clipped_sum(params, step, batch, padding, images, labels):
    keys = dpm.record_keys(dpm.stream_key(seed, "augmentation"), step, batch)
    sets = jax.vmap(record_set)(keys, images[batch], labels[batch])
    return gradient_fn(params, *sets, is_padding_example=padding)[0]


params = jnp.zeros((64, 10))
noise_state = plan.noise_addition_transform.init(params)
batches = plan.batch_selection_strategy.batch_iterator(len(images), rng=seed)
for step, drawn in enumerate(batches):
    total = jnp.zeros_like(params)
    for batch in dpm.microbatches(drawn, 512):
        total += clipped_sum(params, step, batch, batch < 0, images, labels)
    noisy, noise_state = plan.noise_addition_transform.update(total, noise_state)
    params -= 1.0 * noisy / batch_size

logits = test_images.reshape(len(test_images), -1) @ params
print(f"({config.epsilon:g}, {config.delta:g})-DP, {relation.name.lower()}")
print(accuracy(logits, test_labels))
