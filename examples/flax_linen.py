"""A Flax Linen model, trained privately."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from loop import accuracy, digits, train_privately


class Net(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(16, (3, 3))(images))
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


model = Net()
params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def loss_fn(params, images, labels):
    logits = model.apply(params, images)
    return optax.softmax_cross_entropy(logits, labels).mean()


images, labels, test_images, test_labels = digits()
seed = 1234  # from `secrets` if the model is to be released
params = train_privately(loss_fn, params, images, labels, seed=seed)

logits = model.apply(params, test_images)
print(accuracy(logits, test_labels))
