"""An ordinary optax loop that gains DP-Mix: what changes is marked by (1) to (4).

Without them the loop shuffles, draws batches of 256, takes the gradient of their mean
loss and steps. None of the four may be left out.
"""

import jax
import jax.numpy as jnp
import optax
from loop import AUGMENTATION, METHOD, accuracy, digits

import dpmix_jax as dpm

images, labels, test_images, test_labels = digits()
seed = 1234  # from `secrets` if the model is to be released
num_updates, q = 60, 256 / len(images)


def loss_fn(params, images, labels):
    logits = images.reshape(len(images), -1) @ params
    return optax.softmax_cross_entropy(logits, labels).mean()


# (1) a clipped gradient of each record's set, in place of jax.grad of a batch
record_set = dpm.augmentation_set(METHOD, AUGMENTATION)
gradient_fn = dpm.clipped_gradient(loss_fn, l2_clip_norm=1.0)
# (2) noise before the optimizer
mechanism = dpm.calibrate(
    epsilon=3.0, delta=1e-5, sampling_prob=q, num_updates=num_updates
)
noise = dpm.privatizer(
    gradient_fn, mechanism, expected_batch_size=256, key=dpm.noise_key(seed)
)
optimizer = optax.chain(noise, optax.sgd(1.0))


@jax.jit
def gradient(params, step, batch, padding, images, labels):
    # (3) instead of jax.grad(loss_fn)(params, images[batch], labels[batch])
    keys = dpm.record_keys(dpm.stream_key(seed, "augmentation"), step, batch)
    sets = jax.vmap(record_set)(keys, images[batch], labels[batch])
    return gradient_fn(params, *sets, is_padding_example=padding)[0]


params = jnp.zeros((64, 10))
state = optimizer.init(params)
for step in range(num_updates):
    # (4) each record is drawn with probability q, as is accounted for; the batch, of
    # whatever size, is padded to 512 or comes in parts
    drawn = dpm.poisson_batch(seed, step, num_records=len(images), sampling_prob=q)
    total = jnp.zeros_like(params)
    for batch in dpm.microbatches(drawn, 512):
        total += gradient(params, step, batch, batch < 0, images, labels)
    updates, state = optimizer.update(total, state)
    params = optax.apply_updates(params, updates)

logits = test_images.reshape(len(test_images), -1) @ params
print(f"({mechanism.epsilon(1e-5):.3f}, 1e-05)-DP")
print(accuracy(logits, test_labels))
