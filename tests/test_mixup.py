import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dpmix_jax import (
    AugmentationConfig,
    MethodConfig,
    UserError,
    augmentation_set,
    mixups,
    random_pairs,
)

NONE = AugmentationConfig(flip=False, max_shift=0)
SOME = AugmentationConfig(max_shift=2)


def image_and_label(seed=0, size=6):
    image = jax.random.uniform(jax.random.key(seed), (size, size, 1))
    return image, jnp.array([0.0, 1.0, 0.0])


@pytest.mark.parametrize("pool", [2, 3, 5])
@pytest.mark.parametrize("distinct", [True, False])
def test_pairs_are_uniform_over_the_pool_both_ends_included(pool, distinct):
    first, second = random_pairs(jax.random.key(0), pool, 6000, distinct=distinct)
    counts = np.zeros((pool, pool))
    np.add.at(counts, (np.asarray(first), np.asarray(second)), 1)
    possible = ~np.eye(pool, dtype=bool) if distinct else np.ones((pool, pool), bool)
    assert counts[~possible].sum() == 0
    p = scipy.stats.chisquare(counts[possible]).pvalue
    assert 1e-4 < p < 1 - 1e-4


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_one_beta_weight_a_mix(alpha):
    """The weight, read off constant images, is Beta(alpha, alpha), also for labels."""
    images = jnp.stack([jnp.zeros((2, 2, 1)), jnp.ones((2, 2, 1))])
    mixed, labels = mixups(jax.random.key(1), images, jnp.eye(2), 4000, alpha=alpha)
    weights = np.asarray(mixed[:, 0, 0, 0])
    np.testing.assert_array_equal(
        np.asarray(mixed), np.broadcast_to(weights[:, None, None, None], mixed.shape)
    )
    np.testing.assert_allclose(labels[:, 1], weights, atol=1e-6)
    np.testing.assert_allclose(labels.sum(axis=1), 1.0, atol=1e-6)
    p = scipy.stats.kstest(weights, scipy.stats.beta(alpha, alpha).cdf).pvalue
    assert 1e-4 < p < 1 - 1e-4
    wrong = scipy.stats.beta(2 * alpha, 2 * alpha).cdf
    assert scipy.stats.kstest(weights, wrong).pvalue < 1e-6


@pytest.mark.proves("mixup.mixups", 1)
def test_mixes_are_on_the_segments_between_members():
    pool = jax.random.uniform(jax.random.key(2), (4, 3, 3, 1))
    labels = jax.nn.one_hot(jnp.arange(4), 4)
    mixed, soft = mixups(jax.random.key(3), pool, labels, 50, alpha=1.0)
    assert (np.count_nonzero(soft, axis=1) == 2).all()
    rebuilt = jnp.einsum("mp,phwc->mhwc", soft, pool)  # labels reveal the weights
    np.testing.assert_allclose(mixed, rebuilt, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "views", "mixes"),
    [("dp_sgd", 1, 0), ("self_aug", 5, 0), ("dp_mix_self", 5, 3)],
)
def test_sizes_and_labels(name, views, mixes):
    method = MethodConfig(name=name, k_base=5, k_self=3)
    assert (method.num_views, method.num_mixes) == (views, mixes)
    image, label = image_and_label()
    images, labels = augmentation_set(method, SOME)(jax.random.key(0), image, label)
    assert images.shape == (views + mixes, 6, 6, 1)
    assert method.set_size == views + mixes
    np.testing.assert_allclose(labels, np.tile(label, (views + mixes, 1)), atol=1e-6)


@pytest.mark.proves("mixup.augmentation_set", 2)
def test_reductions():
    """k_self = 0 is self_aug; dp_sgd is the record, and so is one view that is it."""
    image, label = image_and_label()
    key = jax.random.key(5)

    def images(augmentation, **method):
        return np.asarray(
            augmentation_set(MethodConfig(**method), augmentation)(key, image, label)[0]
        )

    np.testing.assert_array_equal(
        images(SOME, name="dp_mix_self", k_base=5, k_self=0),
        images(SOME, name="self_aug", k_base=5),
    )
    np.testing.assert_array_equal(images(SOME, name="dp_sgd"), image[None])
    np.testing.assert_array_equal(
        images(NONE, name="dp_mix_self", k_base=1, k_self=0), image[None]
    )
    np.testing.assert_array_equal(
        images(SOME, name="dp_mix_self", k_base=5, k_self=3)[:5],
        images(SOME, name="self_aug", k_base=5),
    )


@pytest.mark.proves("mixup.augmentation_set", 1)
@hypothesis.given(
    name=st.sampled_from(["dp_sgd", "self_aug", "dp_mix_self"]),
    changed=st.integers(0, 3),
    bad=st.sampled_from([0.0, np.nan, np.inf, 1e30]),
)
@hypothesis.settings(max_examples=10)
def test_another_record_changes_nothing(name, changed, bad):
    """The sets of the other records of a batch stay bit-identical."""
    record_set = augmentation_set(MethodConfig(name=name, k_base=3, k_self=2), SOME)
    images = jax.random.uniform(jax.random.key(0), (4, 5, 5, 1))
    labels = jax.nn.one_hot(jnp.arange(4) % 3, 3)
    keys = jax.random.split(jax.random.key(1), 4)
    changed_labels = labels.at[changed].set(bad)
    before = jax.vmap(record_set)(keys, images, labels)
    after = jax.vmap(record_set)(keys, images.at[changed].set(bad), changed_labels)
    others = np.arange(4) != changed
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[others], b[others])
        for i in range(4):  # and each is what its record gives alone
            alone = jax.jit(record_set)(keys[i], images[i], labels[i])
            np.testing.assert_allclose(before[0][i], alone[0], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mixmatch"}, "method.name is 'mixmatch': it must be one of dp_sgd"),
        (
            {"name": "self_aug", "k_base": 0},
            "method.k_base is 0: it must be at least 1",
        ),
        ({"k_self": -1}, "method.k_self is -1: it must be at least 0"),
        ({"alpha": 0.0}, "method.alpha is 0.0: it must be positive"),
        ({"alpha": float("nan")}, "method.alpha is nan: it must be positive"),
        ({"k_base": 1}, "method.k_base is 1: pairs of distinct views need at least 2"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        MethodConfig(**options)


def test_equal_members_may_be_paired_when_asked():
    assert MethodConfig(k_base=1, distinct_pairs=False).set_size == 19
