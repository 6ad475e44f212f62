"""`microbatch_mixup`: groups of records, their sets, and what one record can do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from dp_accounting import NeighboringRelation

from dpmix_jax import (
    AugmentationConfig,
    MethodConfig,
    UserError,
    augmentation_set,
    clipped_gradient,
    group_set,
    poisson_batch,
    random_groups,
)
from dpmix_jax.sampling import batches
from tests import toy

STILL = AugmentationConfig(flip=False, max_shift=0)
METHOD = MethodConfig(name="microbatch_mixup", k_base=2)
MAKE = jax.jit(group_set(METHOD, STILL))
N, G = 60, 7


def groups_of(step, indices, num_groups=G):
    return random_groups(
        0, step, np.asarray(indices, np.int32), num_records=N, num_groups=num_groups
    )


def rows(groups):
    return {frozenset(row[row >= 0].tolist()) for row in groups}


@pytest.mark.proves("sampling.random_groups", 1)
def test_a_record_that_leaves_changes_its_own_group_only():
    for step in range(20):
        batch = poisson_batch(0, step, num_records=N, sampling_prob=0.4)
        whole = groups_of(step, batch)
        assert sorted(whole[whole >= 0]) == sorted(batch)
        gone = batch[len(batch) // 2]
        before, after = rows(whole), rows(groups_of(step, batch[batch != gone]))
        (own,) = [row for row in before if gone in row]
        assert after - {frozenset()} == before - {own} | {own - {gone}} - {frozenset()}
        capacity = whole.shape[1]
        assert capacity & (capacity - 1) == 0  # a power of two
        assert all((row[:-1] >= 0).tolist() >= (row[1:] >= 0).tolist() for row in whole)


@pytest.mark.proves("sampling.random_groups", 1)
def test_groups_are_uniform_and_independent():
    everyone = np.arange(N)
    together = np.zeros((N, N))
    steps = 400
    for step in range(steps):
        for row in groups_of(step, everyone):
            members = row[row >= 0]
            together[np.ix_(members, members)] += 1
    pairs = together[np.triu_indices(N, 1)]
    expected, spread = steps / G, steps / G * (1 - 1 / G)
    chi2 = np.sum((pairs - expected) ** 2) / spread
    below = scipy.stats.chi2(len(pairs)).cdf(chi2)
    assert 1e-3 < below < 1 - 1e-3
    assert groups_of(0, []).shape[0] == 0


def test_batches_of_groups_hold_every_record_once():
    draw = batches(
        3,
        num_records=N,
        sampling_prob=0.5,
        microbatch_size=16,
        num_groups=8,
        num_devices=2,
    )
    for step in range(5):
        parts = draw(step)
        assert len({part.shape for part in parts}) == 1
        assert parts[0].shape[0] % 2 == 0
        found = np.concatenate([part.ravel() for part in parts])
        batch = poisson_batch(3, step, num_records=N, sampling_prob=0.5)
        assert sorted(found[found >= 0]) == sorted(batch)


def members(count, capacity=4, seed=0):
    """Keys, one-colour images and labels of a group, absent ones with NaN pixels."""
    keys = jax.random.split(jax.random.key(seed), capacity)
    present = np.arange(capacity) < count
    colours = np.where(present, 10.0 ** np.arange(capacity), np.nan)
    images = np.broadcast_to(colours[:, None, None, None], (capacity, 6, 6, 1))
    labels = np.eye(capacity)[np.arange(capacity)] * present[:, None]
    return keys, jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.float32)


@pytest.mark.proves("mixup.group_set", 1)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_set_mixes_each_view_with_one_of_another_member(count):
    """Labels tell the weights; images have the same, and absent ones are nothing."""
    keys, images, labels = members(count)
    mixed, soft = MAKE(keys, images, labels)
    assert mixed.shape == (8, 6, 6, 1)
    assert soft.shape == (8, 4)
    np.testing.assert_allclose(
        soft.sum(axis=1), [4 / count] * 2 * count + [0] * 2 * (4 - count), rtol=1e-5
    )
    weights = np.asarray(soft) * count / 4
    colours = np.nan_to_num(np.asarray(images[:, 0, 0, 0]))
    np.testing.assert_allclose(mixed[:, 0, 0, 0], weights @ colours, rtol=1e-4)
    assert np.isfinite(mixed).all()
    for place in range(2 * count):
        partners = np.flatnonzero(weights[place] > 1e-7)
        assert set(partners) <= set(range(count))
        assert len(partners) <= 2
        if count == 1:
            np.testing.assert_allclose(weights[place], [1, 0, 0, 0], atol=1e-6)


def test_partners_and_weights_are_those_that_are_meant():
    """All other members alike, and Beta(alpha, alpha)."""
    method = dataclasses.replace(METHOD, k_base=1, alpha=0.5)
    _, images, labels = members(3, capacity=3)
    keys = jax.random.split(jax.random.key(5), (2000, 3))
    of_many = jax.jit(jax.vmap(group_set(method, STILL), (0, None, None)))
    weights = np.asarray(of_many(keys, images, labels)[1])  # [2000, 3, 3]
    own = weights[:, 0, 0]
    assert scipy.stats.kstest(own, scipy.stats.beta(0.5, 0.5).cdf).pvalue > 1e-3
    with_second = (weights[:, 0, 1] > weights[:, 0, 2]).sum()
    assert scipy.stats.binomtest(int(with_second), 2000).pvalue > 1e-3


def test_the_mean_over_the_set_is_that_over_its_members():
    """A loop over members, without padding, gives the gradient of the group."""
    params = toy.init_params()
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(4, 6, 6, 1)), jnp.float32)
    labels = jax.nn.one_hot(jnp.array([0, 1, 2, 0]), 3).at[3].set(0.0)
    keys = jax.random.split(jax.random.key(1), 4)
    make = jax.jit(group_set(METHOD, AugmentationConfig(max_shift=1)))
    gradient, made = jax.jit(jax.grad(toy.loss_fn)), make(keys, images, labels)
    whole = gradient(params, *made)
    each = [
        toy.flat(gradient(params, image[None], label[None] * 3 / 4))
        for image, label in zip(made[0][:6], made[1][:6], strict=True)
    ]
    np.testing.assert_allclose(toy.flat(whole), np.mean(each, axis=0), atol=1e-6)


@pytest.mark.proves("gradients.clipped_gradient", 6)
def test_one_record_can_move_a_sum_by_twice_the_clip_and_no_more():
    """A record that outweighs its fellow turns the group's gradient around."""
    params, clip = toy.init_params(), 0.01
    gradient_fn = clipped_gradient(
        toy.loss_fn, l2_clip_norm=clip, records_share_terms=True
    )
    total = jax.jit(lambda *sets: gradient_fn(params, *sets)[0])
    alone = clipped_gradient(toy.loss_fn, l2_clip_norm=clip)
    for relation in NeighboringRelation:
        assert gradient_fn.sensitivity(relation) == 2 * alone.sensitivity(relation)
    images = jax.random.normal(jax.random.key(0), (1, 2, 6, 6, 1))
    both = jnp.array([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    without = both.at[0, 1].set(0.0)
    farthest = 0.0
    for factor in (1.0, -30.0, 30.0):  # any gradient is allowed to a record
        whole = total(images, both.at[0, 1].multiply(factor))
        moved = toy.flat(whole) - toy.flat(total(images, without))
        farthest = max(farthest, np.linalg.norm(moved))
    assert 1.2 * clip < farthest <= gradient_fn.sensitivity() * (1 + 1e-5)


def test_refuses_groups_of_one():
    with pytest.raises(UserError, match="its sets are of groups of records"):
        augmentation_set(METHOD, STILL)
    with pytest.raises(
        UserError, match=r"method.group_size is 1: it must be at least 2"
    ):
        MethodConfig(name="microbatch_mixup", group_size=1)
    assert METHOD.num_groups(256) == 128
    assert METHOD.num_groups(1) == 1
    assert METHOD.set_size == 2
    assert MethodConfig(name="dp_sgd").num_groups(256) is None
