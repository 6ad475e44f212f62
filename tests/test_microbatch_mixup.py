"""Groups of records, their sets, and what one record can do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from dp_accounting import NeighboringRelation

from dpmix_jax import (
    AugmentationConfig,
    Mechanism,
    UserError,
    clipped_gradient,
    data,
    devices,
    poisson_batch,
    training,
)
from dpmix_jax.baselines.microbatch_mixup import (
    MicrobatchMixupConfig,
    batches,
    blank_microbatch,
    group_set,
    of_groups,
    random_groups,
)
from dpmix_jax.run import build
from dpmix_jax.run.cli import load_experiment
from dpmix_jax.run.statement import privacy_report, statement
from tests import toy

METHOD = MicrobatchMixupConfig(k_base=2)
GROUP_SET = group_set(METHOD, AugmentationConfig(max_shift=1))
MAKE = jax.jit(GROUP_SET)
N, G = 60, 7


def groups_of(step, indices, num_groups=G):
    return random_groups(
        0, step, np.asarray(indices, np.int32), num_records=N, num_groups=num_groups
    )


def rows(groups):
    return {
        (frozenset(row[row >= 0].tolist()), len(row)) for part in groups for row in part
    }


@pytest.mark.proves("baselines.microbatch_mixup.random_groups", 1)
def test_a_record_that_leaves_changes_its_own_group_only():
    """Neither members nor places of another one, also where its own was the largest."""
    for step in range(40):
        batch = poisson_batch(0, step, num_records=N, sampling_prob=0.4)
        whole = groups_of(step, batch)
        members = [row for part in whole for row in part]
        assert sorted(np.concatenate(members)[np.concatenate(members) >= 0]) == sorted(
            batch
        )
        largest = max(members, key=lambda row: (row >= 0).sum())
        gone = largest[0]
        before, after = rows(whole), rows(groups_of(step, batch[batch != gone]))
        (own,) = [row for row in before if gone in row[0]]
        left = own[0] - {gone}
        places = 1 << (len(left) - 1).bit_length() if left else 0
        assert after == before - {own} | ({(left, places)} if left else set())
        for row in members:
            assert len(row) & (len(row) - 1) == 0  # a power of two
            assert (row >= 0).sum() > len(row) // 2
            assert (np.diff((row >= 0).astype(int)) <= 0).all()  # members first


@pytest.mark.proves("baselines.microbatch_mixup.random_groups", 1)
def test_groups_are_uniform_and_independent():
    everyone = np.arange(N)
    together = np.zeros((N, N))
    steps = 400
    for step in range(steps):
        for row in (row for part in groups_of(step, everyone) for row in part):
            members = row[row >= 0]
            together[np.ix_(members, members)] += 1
    pairs = together[np.triu_indices(N, 1)]
    expected, spread = steps / G, steps / G * (1 - 1 / G)
    chi2 = np.sum((pairs - expected) ** 2) / spread
    below = scipy.stats.chi2(len(pairs)).cdf(chi2)
    assert 1e-3 < below < 1 - 1e-3
    assert groups_of(0, []) == []


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
        for part in parts:
            assert len(part) % 2 == 0
            assert part.size <= max(16, 2 * part.shape[1])
        found = np.concatenate([part.ravel() for part in parts])
        batch = poisson_batch(3, step, num_records=N, sampling_prob=0.5)
        assert sorted(found[found >= 0]) == sorted(batch)
    blank = blank_microbatch(MicrobatchMixupConfig(group_size=3), 16, 2)
    assert blank.shape == (2, 8)
    assert (blank == -1).all()


@pytest.mark.proves("training.make_accumulate", 3)
def test_a_sum_over_groups_compiles_once_for_each_size():
    """And those who are absent bring nothing: a loss that counts labels tells."""
    records, mesh = toy.records(N), devices.make_mesh()

    def loss_fn(params, images, labels):
        return (labels * params[None]).sum()

    accumulate = training.make_accumulate(
        training.make_clipped_sum(
            training.make_sets(
                lambda key, images, labels, pool: (images, labels),
                normalize=records.normalize,
                num_classes=toy.NUM_CLASSES,
            ),
            of_groups(clipped_gradient(loss_fn, l2_clip_norm=100.0)),
            l2_clip_norm=0.5,  # all are counted
        ),
        mesh,
    )
    inputs = training.put_inputs(
        jax.random.key(0), mesh, records=(records.images, records.labels)
    )
    params, step = devices.put_everywhere((np.zeros(3), np.int32(0)), mesh)
    draw = batches(
        0, num_records=N, sampling_prob=0.15, microbatch_size=8, num_groups=G
    )
    shapes = set()
    for update in range(12):
        sums, parts = training.init_sums(params, mesh), draw(update)
        for part in parts:
            with toy.compilations() as compiled:
                batch = training.put_batch(part, mesh)
                sums = accumulate(sums, params, step, batch, inputs)
            assert len(compiled) == (part.shape not in shapes)
            shapes.add(part.shape)
        drawn = np.concatenate([part[part >= 0] for part in parts])
        counts = np.bincount(records.labels[drawn], minlength=3)
        np.testing.assert_array_equal(sums.gradients, counts)
        assert sums.nonprivate["records"] == float(len(drawn))
        assert sums.nonprivate["clipped"] == float(len(drawn))
    assert {capacity for _, capacity in shapes} >= {1, 2, 4}


def members(count, capacity=4, seed=0):
    """Keys, one-colour images and labels of a group, absent ones with NaN pixels."""
    keys = jax.random.split(jax.random.key(seed), capacity)
    present = np.arange(capacity) < count
    colours = np.where(present, 10.0 ** np.arange(capacity), np.nan)
    images = np.broadcast_to(colours[:, None, None, None], (capacity, 6, 6, 1))
    labels = np.eye(capacity)[np.arange(capacity)] * present[:, None]
    return keys, jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.float32)


@pytest.mark.proves("baselines.microbatch_mixup.group_set", 1)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_set_mixes_each_view_with_one_of_another_member(count):
    """Labels tell the weights; images have the same, and absent ones are nothing."""
    keys, images, labels = members(count)
    mixed, soft = MAKE(keys, images, labels)
    blank = jnp.where(labels.sum(axis=1)[:, None, None, None] > 0, images, 0.0)
    np.testing.assert_array_equal(mixed, MAKE(keys, blank, labels)[0])
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


@pytest.mark.sampled
def test_partners_and_weights_are_those_that_are_meant():
    """All other members alike, and Beta(alpha, alpha)."""
    method = dataclasses.replace(METHOD, k_base=1, alpha=0.5)
    still = AugmentationConfig(flip=False, max_shift=0)
    _, images, labels = members(3, capacity=3)
    keys = jax.random.split(jax.random.key(5), (2000, 3))
    of_many = jax.jit(jax.vmap(group_set(method, still), (0, None, None)))
    weights = np.asarray(of_many(keys, images, labels)[1])  # [2000, 3, 3]
    own = weights[:, 0, 0]
    assert scipy.stats.kstest(own, scipy.stats.beta(0.5, 0.5).cdf).pvalue > 1e-3
    with_second = (weights[:, 0, 1] > weights[:, 0, 2]).sum()
    assert scipy.stats.binomtest(int(with_second), 2000).pvalue > 1e-3


def test_the_mean_over_the_set_is_that_over_its_members():
    """A loop over members, without padding, gives the gradient of the group."""
    keys, images, labels = members(3)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=images.shape), jnp.float32)
    seen, soft = MAKE(keys, images, labels)
    made = seen, soft[:, :3]  # the fourth class is of the absent
    params, gradient = toy.init_params(), jax.jit(jax.grad(toy.loss_fn))
    each = [
        toy.flat(gradient(params, image[None], label[None] * 3 / 4))
        for image, label in zip(made[0][:6], made[1][:6], strict=True)
    ]
    whole = gradient(params, *made)
    np.testing.assert_allclose(toy.flat(whole), np.mean(each, axis=0), atol=1e-6)


@pytest.mark.proves("baselines.microbatch_mixup.of_groups", 1)
def test_one_record_can_move_a_sum_by_twice_the_clip_and_no_more():
    """A record that outweighs its fellow turns the group's gradient around."""
    params, clip = toy.init_params(), 0.01
    alone = clipped_gradient(toy.loss_fn, l2_clip_norm=clip)
    gradient_fn = of_groups(alone)
    total = jax.jit(lambda *sets: gradient_fn(params, *sets)[0])
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "method.group_size is 1: it must be at least 2"),
        ({"k_base": 0}, "method.k_base is 0: it must be at least 1"),
        ({"alpha": 0.0}, "method.alpha is 0.0: it must be positive and finite"),
        ({"alpha": float("nan")}, "method.alpha is nan: it must be positive and"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        MicrobatchMixupConfig(**options)


FLAGS = ["method.name=microbatch_mixup", "method.group_size=8", "seed=0"]
FLAGS += ["privacy.l2_clip_norm=0.5", "privacy.num_updates=3"]


def load(*flags):
    return load_experiment(
        ["--config=configs/digits.py", *(f"--config.{f}" for f in (*FLAGS, *flags))]
    )


def test_a_config_may_leave_the_sizes_of_other_methods_at_0():
    method = load("method.k_self=0", "method.k_diff=0", "method.k_base=3").method
    assert method == MicrobatchMixupConfig(k_base=3, group_size=8)
    assert method.set_size == 3
    assert method.num_groups(256) == 32
    assert method.num_groups(1) == 1
    for size in ("k_self", "k_diff"):
        message = f"method.{size} is 4: it must be 0 for method.name 'microbatch_mixup'"
        with pytest.raises(UserError, match=message):
            load("method.k_self=0", f"method.{size}=4")


def test_a_run_adds_noise_for_groups():
    """Twice the clip norm, divided by the expected number of groups, and it says so."""
    config = load("method.k_self=0")
    train = data.load(config.data).train
    mechanism = Mechanism(sampling_prob=0.1, num_updates=3, noise_multiplier=3.0)
    model = build.classifier(config, train)
    parts = build.build(config, model, model.shapes, train, mechanism=mechanism, seed=0)
    assert parts.terms.expected == 256 // 8
    nothing = jax.tree.map(jnp.zeros_like, parts.state.params)
    after = parts.apply_update(parts.state, nothing)
    moved = toy.flat(after.params) - toy.flat(parts.state.params)
    expected = 3.0 * 2 * 0.5 / 32 * config.optimizer.learning_rate
    assert np.std(moved) == pytest.approx(expected, rel=0.05)
    report = privacy_report(
        config.privacy,
        mechanism,
        num_records=len(train),
        num_parameters=10**6,
        images_per_record=config.method.set_size,
        secret_seed=False,
        sensitivity=parts.gradient_fn.sensitivity(config.privacy.relation),
        num_groups=int(parts.terms.expected),
    )
    text = " ".join(statement(report).split())
    assert "times the sensitivity of that sum, 1; T = 3" in text
    assert "gradients of groups of records (8 expected in each" in text
