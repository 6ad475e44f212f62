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
    make_pool,
    mixups,
    random_pairs,
)
from dpmix_jax.mixup import METHODS
from dpmix_jax.pool import draw_rows
from tests import toy

NONE = AugmentationConfig(flip=False, max_shift=0)
SOME = AugmentationConfig(max_shift=2)
DRAWS = {"dp_mix_diff": "uniform", "pure_dp_mix_diff": "class"}
IMAGE = jax.random.uniform(jax.random.key(0), (6, 6, 1))
LABEL = jnp.array([0.0, 1.0, 0.0])
NUM = 4000  # mixes whose distribution is tested


def public(seed=0, num=7):
    rng = np.random.default_rng(seed)
    images = rng.random((num, 6, 6, 1), np.float32)
    return make_pool(images, np.arange(num) % 3, "abc", draw="class")


def set_of(method, augmentation, *args):
    return jax.jit(augmentation_set(method, augmentation))(*args)


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
    mixed, labels = mixups(jax.random.key(1), images, jnp.eye(2), NUM, alpha=alpha)
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
    mixed, soft = mixups(jax.random.key(3), pool, labels, NUM, alpha=1.0)
    assert (np.count_nonzero(soft, axis=1) == 2).all()
    rebuilt = jnp.einsum("mp,phwc->mhwc", soft, pool)  # labels reveal the weights
    np.testing.assert_allclose(mixed, rebuilt, atol=1e-6)


@functools.cache
def batch_of_sets(name, **options):
    method = toy.method(name, draw=DRAWS.get(name, "uniform"), **options)
    record_set = augmentation_set(method, SOME)
    return jax.jit(jax.vmap(record_set, in_axes=(0, 0, 0, None)))


@pytest.mark.proves("mixup.augmentation_set", 2)
def test_reductions():
    """k_self = 0 is self_aug; dp_sgd is the record, and so is one view that is it."""
    keys = jax.random.split(jax.random.key(5), 4)
    batch = keys, jnp.stack([IMAGE] * 4), jnp.stack([LABEL] * 4), public()

    def images(name, **sizes):
        images, labels = batch_of_sets(name, **sizes)(*batch)
        assert images.shape[:2] == labels.shape[:2]
        assert images.shape[1] == toy.method(name, **sizes).set_size
        return np.asarray(images)

    views = images("self_aug")
    np.testing.assert_array_equal(images("dp_mix_self", k_self=0), views)
    np.testing.assert_array_equal(images("dp_sgd"), np.asarray(batch[1])[:, None])
    for name in ("dp_mix_self", "dp_mix_diff"):
        np.testing.assert_array_equal(images(name)[:, :3], views)
    one = MethodConfig(k_base=1, k_self=0)
    np.testing.assert_array_equal(
        set_of(one, NONE, keys[0], IMAGE, LABEL)[0], IMAGE[None]
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


@pytest.mark.proves("mixup.augmentation_set", 1)
@hypothesis.given(
    name=st.sampled_from(list(METHODS)),
    changed=st.integers(0, 3),
    bad=st.sampled_from([0.0, np.nan, np.inf, 1e30]),
    seed=st.integers(0, 1),
)
@hypothesis.settings(max_examples=20)
def test_another_record_changes_nothing(name, changed, bad, seed):
    """Whatever the pool."""
    sets, pool = batch_of_sets(name), public(seed=seed)
    check_others_unchanged(lambda *batch: sets(*batch, pool), changed, bad)


def test_the_check_catches_a_pool_made_of_the_batch():
    sets = batch_of_sets("dp_mix_diff")

    def leaking(keys, images, labels):
        pool = make_pool(np.resize(images, (7, 6, 6, 1)), np.zeros(7, int), "abc")
        return sets(keys, images, labels, pool)

    with pytest.raises(AssertionError):
        check_others_unchanged(leaking, 2, 0.0)


@pytest.mark.proves("mixup.augmentation_set", 3)
def test_only_drawn_public_images_matter():
    pool, keys = public(), jax.random.split(jax.random.key(0), 4)
    batch = keys, jnp.stack([IMAGE] * 4), jnp.stack([LABEL] * 4)
    for name in METHODS:
        sets = batch_of_sets(name)
        before, _ = sets(*batch, pool)
        for i in range(4) if name in DRAWS else [0]:
            draw_key = jax.random.split(jax.random.fold_in(keys[i], 2))[0]
            draw = DRAWS.get(name, "uniform")
            rows = np.asarray(draw_rows(draw_key, LABEL, pool, 2, draw=draw))
            for spoil_drawn in (False, True):
                images = pool.images.copy()
                images[np.isin(np.arange(7), rows) == spoil_drawn] = np.nan
                after, _ = sets(*batch, pool._replace(images=images))
                matters = spoil_drawn and name in DRAWS
                assert np.array_equal(before[i], after[i]) != matters


@pytest.mark.sampled("dp_mix_diff-uniform")
@pytest.mark.parametrize(("name", "draw"), DRAWS.items())
def test_sets_with_public_images(name, draw):
    """Views, then public images, then mixes of both; labels soft across classes."""
    method = toy.method(name, k_diff=4, k_self=200, draw=draw)
    views, pool = method.num_views if name == "dp_mix_diff" else 0, public()
    assert (method.num_views, method.num_public) == (views, 4)
    images, labels = set_of(method, NONE, jax.random.key(4), IMAGE, LABEL, pool)
    assert images.shape == (method.set_size, 6, 6, 1) == (views + 204, 6, 6, 1)
    unmixed, mixes = images[: views + 4], images[views + 4 :]
    np.testing.assert_array_equal(unmixed[:views], np.tile(IMAGE, (views, 1, 1, 1)))
    for drawn, soft in zip(unmixed[views:], labels[views : views + 4], strict=True):
        row = np.flatnonzero((pool.images == np.asarray(drawn)).all(axis=(1, 2, 3)))
        assert soft[pool.labels[row[0]]] == soft.sum() == 1
    np.testing.assert_allclose(labels.sum(axis=1), 1.0, atol=1e-6)
    if draw == "class":
        np.testing.assert_allclose(labels, np.tile(LABEL, (len(labels), 1)), atol=1e-6)
    else:  # across classes, and of views with public images
        assert (np.count_nonzero(labels[views + 4 :], axis=1) == 2).any()
    basis = np.asarray(unmixed).reshape(views + 4, -1)
    solution = np.linalg.lstsq(basis.T, np.asarray(mixes).reshape(200, -1).T)[0]
    np.testing.assert_allclose(basis.T @ solution, mixes.reshape(200, -1).T, atol=1e-4)


def test_public_images_are_augmented_like_views():
    """A pool of one image, the record's: its views are distributed as the record's."""
    pool = make_pool(np.asarray(IMAGE)[None], np.array([1]), "abc")
    method = MethodConfig(name="dp_mix_diff", k_base=400, k_diff=400, k_self=0)
    images, _ = set_of(method, SOME, jax.random.key(0), IMAGE, LABEL, pool)
    kinds, which = np.unique(np.asarray(images), axis=0, return_inverse=True)
    assert len(kinds) == 2 * 25  # flips times shifts
    counts = [np.bincount(part, minlength=50) for part in np.split(which, 2)]
    assert 1e-4 < scipy.stats.chi2_contingency(counts).pvalue < 1 - 1e-4
    assert not np.array_equal(which[:400], which[400:])  # by keys of their own


def test_pairs_are_uniform_over_views_and_public_images():
    """Read off the labels: of views they have class 0, of public images class 2."""
    method = toy.method("dp_mix_diff", k_base=2, k_self=NUM, alpha=4.0)
    pool = make_pool(np.zeros((1, 6, 6, 1), np.float32), np.array([2]), "abc")
    label = jnp.eye(3)[0]
    _, labels = set_of(method, NONE, jax.random.key(9), IMAGE, label, pool)
    of_public = np.asarray(labels[method.pool_size :, 2])
    counts = [(of_public == 0).sum(), (of_public == 1).sum()]  # of 6 pairs, one each
    expected = [NUM / 6, NUM / 6, 4 * NUM / 6]
    assert scipy.stats.chisquare([*counts, NUM - sum(counts)], expected).pvalue > 1e-4


def pool_of(images, names="abc"):
    return make_pool(images, np.array([0]), names)


BLANK = np.zeros((1, 6, 6, 1), np.float32)


def test_hard_labels_and_lone_images_are_not_mixed():
    """Integers would make each weight 0."""
    images, labels = jnp.zeros((2, 6, 6, 1)), jnp.eye(2, dtype=int)
    with pytest.raises(UserError, match="labels is int32: it must be soft"):
        mixups(jax.random.key(0), images, labels, 3, alpha=0.2)
    with pytest.raises(UserError, match="pool_size is 1: it must be at least 2"):
        random_pairs(jax.random.key(0), 1, 3, distinct=True)


@pytest.mark.parametrize(
    ("images", "labels", "alpha", "message"),
    [
        (jnp.zeros((2, 3), jnp.uint8), jnp.eye(2), 0.2, "images is uint8: it must be"),
        (
            jnp.zeros((3, 3)),
            jnp.eye(2),
            0.2,
            "labels is 2: it must be 3, as the images",
        ),
        (
            jnp.zeros((2, 3)),
            jnp.eye(2),
            0,
            "alpha is 0: it must be positive and finite",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(images, labels, alpha, message):
    with pytest.raises(UserError, match=message):
        mixups(jax.random.key(0), images, labels, 3, alpha=alpha)


@pytest.mark.parametrize(
    ("image", "label", "pool", "message"),
    [
        (IMAGE, LABEL, None, "method.name is 'dp_mix_diff': its sets draw from a pool"),
        (IMAGE, LABEL, pool_of(BLANK[:, :5]), r"public images are float32 \(5, 6, 1\)"),
        (IMAGE, LABEL, pool_of(BLANK.astype(np.uint8)), "public images are uint8"),
        (
            *(IMAGE, LABEL, pool_of(BLANK, "abcd")),
            "public images are of 4 classes: they must be of 3, as the record's label",
        ),
        (IMAGE[None], LABEL, None, r"has shapes \(1, 6, 6, 1\) and \(3,\): they must"),
        (IMAGE, LABEL[None], None, r"has shapes \(6, 6, 1\) and \(1, 3\): they must"),
        (
            IMAGE.astype(jnp.uint8),
            LABEL,
            None,
            "the image is uint8: it must be floating",
        ),
        (
            IMAGE,
            LABEL.astype(int),
            None,
            "the label is int32: it must be soft, in floating-point",
        ),
    ],
)
def test_refuses_records_and_public_images_that_do_not_fit(image, label, pool, message):
    record_set = augmentation_set(MethodConfig(name="dp_mix_diff"), SOME)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(record_set, jax.random.key(0), image, label, pool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mixmatch"}, "method.name is 'mixmatch': it must be one of dp_sgd"),
        ({"name": "self_aug", "k_base": 0}, "method.k_base is 0: it must be at least"),
        ({"name": "self_aug", "k_base": -1}, "method.k_base is -1: it must be at"),
        ({"k_self": -1}, "method.k_self is -1: it must be at least 0"),
        ({"alpha": 0.0}, "method.alpha is 0.0: it must be positive"),
        ({"alpha": float("nan")}, "method.alpha is nan: it must be positive"),
        ({"k_base": 1}, "method.k_base is 1: pairs of distinct views need at least 2"),
        (
            {"name": "pure_dp_mix_diff", "k_diff": 1},
            "method.k_diff is 1: pairs of distinct images need at least 2",
        ),
        ({"name": "dp_mix_diff", "k_diff": 0}, "method.k_diff is 0: it must be at"),
        ({"draw": "near"}, "method.draw is 'near': it must be one of uniform, class"),
        *(
            (
                {"name": name, size: 1},
                f"method.{size} is 1: it must be 0 for method.name '{name}'",
            )
            for name, sizes in {
                "dp_sgd": ("k_base", "k_diff", "k_self"),
                "self_aug": ("k_diff", "k_self"),
                "dp_mix_self": ("k_diff",),
                "pure_dp_mix_diff": ("k_base",),
            }.items()
            for size in sizes
        ),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        MethodConfig(**options)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("dp_sgd", (1, 0, 0)),
        ("self_aug", (16, 0, 0)),
        ("dp_mix_self", (16, 0, 18)),
        ("dp_mix_diff", (16, 2, 18)),
        ("pure_dp_mix_diff", (0, 2, 18)),
    ],
)
def test_the_papers_sizes(name, sizes):
    """Of None, and with 0 for what a method does not have."""
    method = MethodConfig(name=name)
    assert (method.num_views, method.num_public, method.num_mixes) == sizes
    assert method.set_size == sum(sizes)
    kinds = zip(("k_base", "k_diff", "k_self"), METHODS[name], strict=True)
    assert MethodConfig(name=name, **{k: 0 for k, size in kinds if not size}) == method


def test_equal_members_may_be_paired_when_asked():
    assert MethodConfig(k_base=1, distinct_pairs=False).set_size == 19
    assert MethodConfig(k_base=1, k_self=0).set_size == 1
    assert MethodConfig(name="dp_mix_diff", k_base=1).pool_size == 3
