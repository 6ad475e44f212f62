import flax.linen as nn
import pytest

from dpmix_jax import UserError, data, models
from dpmix_jax.config import from_config_dict
from dpmix_jax.pipeline import Model
from tests.test_config import load as load_config


class Normalized(nn.Module):
    """What most image models do."""

    num_classes: int
    dtype: type

    @nn.compact
    def __call__(self, images):
        x = nn.BatchNorm(use_running_average=False)(images)
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


def test_batch_statistics_are_refused(monkeypatch):
    monkeypatch.setitem(models.REGISTRY, "batchnorm", Normalized)
    values = load_config()
    values.model = {"name": "batchnorm"}
    config = from_config_dict(values)
    with pytest.raises(UserError, match="keeps batch_stats: statistics of a batch mix"):
        Model(config, data.load(config.data).train)
