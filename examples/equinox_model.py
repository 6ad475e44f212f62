"""An Equinox model, trained privately (pip install equinox)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from loop import accuracy, digits, train_privately


class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        conv_key, head_key = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 16, 3, padding=1, key=conv_key)
        self.head = eqx.nn.Linear(16 * 4 * 4, 10, key=head_key)

    def __call__(self, image):  # one image, [H, W, C]
        x = jax.nn.relu(self.conv(jnp.moveaxis(image, -1, 0)))
        x = eqx.nn.MaxPool2d(2, 2)(x)
        return self.head(x.reshape(-1))


params, rest = eqx.partition(Net(jax.random.key(0)), eqx.is_inexact_array)


def loss_fn(params, images, labels):
    logits = jax.vmap(eqx.combine(params, rest))(images)
    return optax.softmax_cross_entropy(logits, labels).mean()


images, labels, test_images, test_labels = digits()
seed = 1234  # from `secrets` if the model is to be released
params = train_privately(loss_fn, params, images, labels, seed=seed)

model = eqx.combine(params, rest)
logits = jax.vmap(model)(test_images)
print(accuracy(logits, test_labels))
