"""A private classifier of handwritten digits from the functions of the library."""

import jax
import jax.numpy as jnp
import optax

import dpmix_jax as dpm
from dpmix_jax import data

train = data.load(data.DataConfig(name="digits")).train
images = train.normalize(jnp.asarray(train.images))
labels = jax.nn.one_hot(train.labels, 10)
n, q, T = len(train), 0.1, 60
seed = 1234  # secrets.randbits(256) if the model is to be released


def loss_fn(params, images, labels):  # the mean over the K images of one record
    logits = images.reshape(len(images), -1) @ params
    return optax.softmax_cross_entropy(logits, labels).mean()


mechanism = dpm.calibrate(epsilon=3.0, delta=1e-5, sampling_prob=q, num_updates=T)
method = dpm.MethodConfig(name="dp_mix_self", k_base=4, k_self=4)
shifts = dpm.AugmentationConfig(flip=False, max_shift=0.5, subpixel=True)
record_set = dpm.augmentation_set(method, shifts)
gradient_fn = dpm.clipped_gradient(loss_fn, l2_clip_norm=1.0)
noise = dpm.privatizer(
    gradient_fn, mechanism, expected_batch_size=q * n, key=dpm.noise_key(seed)
)
optimizer = optax.chain(noise, optax.sgd(1.0))
batches = dpm.batches(seed, num_records=n, sampling_prob=q, microbatch_size=64)


@jax.jit
def clipped_sum(params, step, drawn, is_padding, images, labels):
    keys = dpm.record_keys(dpm.stream_key(seed, "augmentation"), step, drawn)
    sets = jax.vmap(record_set)(keys, images[drawn], labels[drawn])
    # Padding counts nothing. [0]: losses and norms, which are private too, stay here.
    return gradient_fn(params, *sets, is_padding_example=is_padding)[0]


params = jnp.zeros((64, 10))
state = optimizer.init(params)
for step in range(T):
    total = jnp.zeros_like(params)  # an empty batch still takes its noisy update
    for batch in batches(step):  # masked arrays of record numbers
        total += clipped_sum(params, step, batch.data, batch.mask, images, labels)
    updates, state = optimizer.update(total, state)
    params = optax.apply_updates(params, updates)
print(f"({mechanism.epsilon(1e-5):.3f}, 1e-05)-DP")
