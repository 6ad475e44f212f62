"""A Flax NNX model, trained privately."""

import optax
from flax import nnx
from loop import accuracy, digits, train_privately


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.head = nnx.Linear(16 * 4 * 4, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.max_pool(nnx.relu(self.conv(images)), (2, 2), (2, 2))
        return self.head(x.reshape(len(x), -1))


model, params = nnx.split(Net(nnx.Rngs(0)))


def loss_fn(params, images, labels):
    logits = nnx.merge(model, params)(images)
    return optax.softmax_cross_entropy(logits, labels).mean()


images, labels, test_images, test_labels = digits()
seed = 1234  # from `secrets` if the model is to be released
params = train_privately(loss_fn, params, images, labels, seed=seed)

logits = nnx.merge(model, params)(test_images)
print(accuracy(logits, test_labels))
