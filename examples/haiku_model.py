"""A Haiku model, trained privately (pip install dm-haiku)."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from loop import accuracy, digits, train_privately


def net(images):
    x = jax.nn.relu(hk.Conv2D(16, 3)(images))
    x = hk.max_pool(x, 2, 2, "SAME")
    return hk.Linear(10)(x.reshape(len(x), -1))


model = hk.without_apply_rng(hk.transform(net))
params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def loss_fn(params, images, labels):
    logits = model.apply(params, images)
    return optax.softmax_cross_entropy(logits, labels).mean()


images, labels, test_images, test_labels = digits()
seed = 1234  # from `secrets` if the model is to be released
params = train_privately(loss_fn, params, images, labels, seed=seed)

logits = model.apply(params, test_images)
print(accuracy(logits, test_labels))
