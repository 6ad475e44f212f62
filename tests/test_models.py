import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax.models.norm import GroupNorm


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_group_norm_is_that_of_flax(dtype):
    """Output and gradients, in float32 and bfloat16."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = (1.0 + 3.0 * jax.random.normal(keys[0], (2, 5, 4, 12))).astype(dtype)
    scale, bias = (jax.random.normal(key, (12,)) for key in keys[1:3])
    params = {"params": {"scale": scale, "bias": bias}}
    weights = jax.random.normal(keys[3], x.shape)

    def value_and_gradients(module, read):
        def loss(params, x):
            out = module.apply(params, x.astype(read))
            assert out.dtype == module.dtype
            return jnp.sum(out.astype(jnp.float32) * weights)

        return jax.value_and_grad(loss, (0, 1))(params, x)

    ours = value_and_gradients(GroupNorm(4, dtype=dtype), dtype)
    flax = nn.GroupNorm(4, epsilon=1e-5, dtype=jnp.float32)
    theirs = value_and_gradients(flax, jnp.float32)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_group_norm_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="6 channels are not 4 groups"):
        GroupNorm(4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))
