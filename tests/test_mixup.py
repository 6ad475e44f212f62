import functools

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
    make_bank,
    mixups,
    random_pairs,
)
from dpmix_jax.bank import draw_rows
from dpmix_jax.mixup import METHODS, OF_GROUPS, WITH_PUBLIC

NONE = AugmentationConfig(flip=False, max_shift=0)
OF_RECORDS = [name for name in METHODS if name not in OF_GROUPS]
SOME = AugmentationConfig(max_shift=2)


def bank(seed=0, num=7, size=6):
    rng = np.random.default_rng(seed)
    images = rng.random((num, size, size, 1), np.float32)
    return make_bank(images, np.arange(num) % 3, "abc", draw="class")


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
        record_set = augmentation_set(MethodConfig(**method), augmentation)
        return np.asarray(record_set(key, image, label, bank())[0])

    np.testing.assert_array_equal(
        images(SOME, name="dp_mix_self", k_base=5, k_self=0),
        images(SOME, name="self_aug", k_base=5),
    )
    np.testing.assert_array_equal(images(SOME, name="dp_sgd"), image[None])
    np.testing.assert_array_equal(
        images(NONE, name="dp_mix_self", k_base=1, k_self=0), image[None]
    )
    for name in ("dp_mix_self", "dp_mix_diff"):
        np.testing.assert_array_equal(
            images(SOME, name=name, k_base=5, k_self=3)[:5],
            images(SOME, name="self_aug", k_base=5),
        )


def check_others_unchanged(sets, changed, bad):
    """Fails unless the sets of the other records of a batch stay bit-identical.

    Args:
      sets: `f(keys, images, labels) -> images, labels` of 4 records.
      changed: which record changes.
      bad: to what.
    """
    images = jax.random.uniform(jax.random.key(0), (4, 6, 6, 1))
    labels = jax.nn.one_hot(jnp.arange(4) % 3, 3)
    keys = jax.random.split(jax.random.key(1), 4)
    before = sets(keys, images, labels)
    after = sets(keys, images.at[changed].set(bad), labels.at[changed].set(bad))
    others = np.arange(4) != changed
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[others], b[others])
    for i in range(4):  # and each is what its record gives among copies of itself
        alone = sets(*(jnp.stack([a[i]] * 4) for a in (keys, images, labels)))
        np.testing.assert_allclose(before[0][i], alone[0][i], atol=1e-6)


@functools.cache
def batch_of_sets(name, draw):
    method = MethodConfig(name=name, k_base=3, k_self=2, draw=draw)
    record_set = augmentation_set(method, SOME)
    return jax.jit(jax.vmap(record_set, in_axes=(0, 0, 0, None)))


@pytest.mark.proves("mixup.augmentation_set", 1)
@hypothesis.given(
    method=st.sampled_from(
        [*((name, "uniform") for name in OF_RECORDS), ("dp_mix_diff", "class")]
    ),
    changed=st.integers(0, 3),
    bad=st.sampled_from([0.0, np.nan, np.inf, 1e30]),
    seed=st.integers(0, 1),
)
@hypothesis.settings(max_examples=20)
def test_another_record_changes_nothing(method, changed, bad, seed):
    """Whatever the bank."""
    sets = batch_of_sets(*method)
    public = bank(seed=seed)
    check_others_unchanged(lambda *batch: sets(*batch, public), changed, bad)


def test_the_check_catches_a_bank_made_of_the_batch():
    sets = batch_of_sets("dp_mix_diff", "uniform")

    def leaking(keys, images, labels):
        public = make_bank(images, np.zeros(len(images), int), "abc")
        return sets(keys, images, labels, public)

    with pytest.raises(AssertionError):
        check_others_unchanged(leaking, 2, 0.0)


@pytest.mark.proves("mixup.augmentation_set", 3)
def test_only_drawn_public_images_matter():
    image, label = image_and_label()
    public, keys = bank(), jax.random.split(jax.random.key(0), 4)
    batch = keys, jnp.stack([image] * 4), jnp.stack([label] * 4)
    for name in OF_RECORDS:
        sets = batch_of_sets(name, "uniform")
        before, _ = sets(*batch, public)
        for i in range(4) if name in WITH_PUBLIC else [0]:
            draw_key = jax.random.split(jax.random.fold_in(keys[i], 2))[0]
            rows = np.asarray(draw_rows(draw_key, label, public, 2, draw="uniform"))
            for spoil_drawn in (False, True):
                images = public.images.copy()
                images[np.isin(np.arange(7), rows) == spoil_drawn] = np.nan
                after, _ = sets(*batch, public._replace(images=images))
                matters = spoil_drawn and name in WITH_PUBLIC
                assert np.array_equal(before[i], after[i]) != matters


@pytest.mark.parametrize("draw", ["uniform", "class"])
@pytest.mark.parametrize("name", WITH_PUBLIC)
def test_sets_with_public_images(name, draw):
    """Views, then public images, then mixes of both; labels soft across classes."""
    method = MethodConfig(name=name, k_base=3, k_diff=4, k_self=200, draw=draw)
    views = 3 if name == "dp_mix_diff" else 0
    assert (method.num_views, method.num_public) == (views, 4)
    assert method.set_size == views + 4 + 200
    image, label = image_and_label()
    public = bank()
    record_set = augmentation_set(method, NONE)
    images, labels = record_set(jax.random.key(4), image, label, public)
    assert images.shape == (method.set_size, 6, 6, 1)
    pool, mixes = images[: views + 4], images[views + 4 :]
    np.testing.assert_array_equal(pool[:views], np.tile(image, (views, 1, 1, 1)))
    for drawn, soft in zip(pool[views:], labels[views : views + 4], strict=True):
        row = np.flatnonzero((public.images == np.asarray(drawn)).all(axis=(1, 2, 3)))
        assert soft[public.labels[row[0]]] == soft.sum() == 1
    np.testing.assert_allclose(labels.sum(axis=1), 1.0, atol=1e-6)
    if draw == "class":
        np.testing.assert_allclose(labels, np.tile(label, (len(labels), 1)), atol=1e-6)
    else:  # across classes, and of views with public images
        assert (np.count_nonzero(labels[views + 4 :], axis=1) == 2).any()
    basis = np.asarray(pool).reshape(views + 4, -1)
    solution = np.linalg.lstsq(basis.T, np.asarray(mixes).reshape(200, -1).T)[0]
    np.testing.assert_allclose(basis.T @ solution, mixes.reshape(200, -1).T, atol=1e-4)


def test_public_images_are_augmented_like_views():
    """A bank of one image, the record's: its views are distributed as the record's."""
    image, label = image_and_label()
    public = make_bank(np.asarray(image)[None], np.array([1]), "abc")
    method = MethodConfig(name="dp_mix_diff", k_base=400, k_diff=400, k_self=0)
    images, _ = augmentation_set(method, SOME)(jax.random.key(0), image, label, public)
    kinds, which = np.unique(np.asarray(images), axis=0, return_inverse=True)
    assert len(kinds) == 2 * 25  # flips times shifts
    counts = [np.bincount(part, minlength=50) for part in np.split(which, 2)]
    assert 1e-4 < scipy.stats.chi2_contingency(counts).pvalue < 1 - 1e-4
    assert not np.array_equal(which[:400], which[400:])  # by keys of their own


@pytest.mark.parametrize("name", WITH_PUBLIC)
def test_pairs_are_uniform_over_the_whole_pool(name):
    """Read off the labels: every image of the pool has a class of its own."""
    image = jnp.zeros((1, 1, 1))
    public = make_bank(np.zeros((1, 1, 1, 1), np.float32), np.array([3]), "abcd")
    method = MethodConfig(name=name, k_base=2, k_diff=2, k_self=4000, alpha=4.0)
    pool = method.pool_size

    def marked(key):
        # As `augmentation_set` mixes a pool, of which each member is marked.
        mix_key = jax.random.split(key)[1]
        images = jnp.zeros((pool, 1, 1, 1))
        return mixups(mix_key, images, jnp.eye(pool), 4000, alpha=4.0)[1]

    key = jax.random.key(9)
    soft = np.asarray(marked(key))
    counts = np.zeros((pool, pool))
    members = np.argsort(-soft, axis=1)[:, :2]
    np.add.at(counts, (members.min(axis=1), members.max(axis=1)), 1)
    observed = counts[np.triu_indices(pool, 1)]
    assert len(observed) == 1 or scipy.stats.chisquare(observed).pvalue > 1e-4
    # Those very marks are what the set is made of: label 0 for views, 3 for public.
    _, labels = augmentation_set(method, NONE)(key, image, jnp.eye(4)[0], public)
    of_public = soft[:, method.num_views :].sum(axis=1)
    np.testing.assert_allclose(labels[pool:, 3], of_public, atol=1e-6)
    np.testing.assert_allclose(labels[pool:, 0], 1 - of_public, atol=1e-6)


@pytest.mark.parametrize(
    ("public", "message"),
    [
        (None, "method.name is 'dp_mix_diff': its sets draw from a bank of public"),
        (np.zeros((1, 5, 5, 1), np.float32), r"public images are float32 \(5, 5, 1\)"),
        (np.zeros((1, 6, 6, 1), np.uint8), r"public images are uint8 \(6, 6, 1\)"),
    ],
)
def test_refuses_public_images_unlike_the_record(public, message):
    record_set = augmentation_set(MethodConfig(name="dp_mix_diff"), SOME)
    given = None if public is None else make_bank(public, np.array([0]), "abc")
    with pytest.raises(UserError, match=message):
        record_set(jax.random.key(0), *image_and_label(), given)


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
        (
            {"name": "pure_dp_mix_diff", "k_diff": 1},
            "method.k_diff is 1: pairs of distinct images need at least 2",
        ),
        (
            {"name": "dp_mix_diff", "k_diff": 0},
            "method.k_diff is 0: it must be at least 1",
        ),
        ({"draw": "near"}, "method.draw is 'near': it must be one of uniform, class"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        MethodConfig(**options)


def test_the_papers_sizes():
    assert MethodConfig(name="dp_mix_diff").set_size == 16 + 2 + 18
    assert MethodConfig(name="pure_dp_mix_diff").set_size == 2 + 18
    assert MethodConfig(name="dp_mix_diff", k_base=1).pool_size == 3


def test_equal_members_may_be_paired_when_asked():
    assert MethodConfig(k_base=1, distinct_pairs=False).set_size == 19
