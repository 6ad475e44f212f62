import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dpmix_jax import UserError, make_pool
from dpmix_jax.pool import draw_rows

LABELS = np.array([2, 0, 2, 1, 2, 0, 1, 2])  # classes of different sizes, mixed up
IMAGES = np.zeros((len(LABELS), 2, 2, 1), np.uint8)
POOL = make_pool(IMAGES, LABELS, "abc", draw="class")
NUM = 4000


@pytest.mark.sampled("0", "2")
@pytest.mark.proves("pool.draw_rows", 2)
@pytest.mark.parametrize("own", [None, 0, 1, 2])
def test_draws_are_uniform_and_independent(own):
    """Over the pool, or over the class; also from record to record."""
    draw = "uniform" if own is None else "class"
    label = jnp.eye(3)[own or 0]
    for keys, num in ((1, NUM), (NUM, 1)):  # many rows of one record, and one of many
        rows = jax.vmap(lambda k, n=num: draw_rows(k, label, POOL, n, draw=draw))(
            jax.random.split(jax.random.key(3), keys)
        ).ravel()
        counts = np.bincount(rows, minlength=len(LABELS))
        possible = np.isin(LABELS, [0, 1, 2] if own is None else own)
        assert counts[~possible].sum() == 0
        assert 1e-4 < scipy.stats.chisquare(counts[possible]).pvalue < 1 - 1e-4
        pairs = np.zeros((len(LABELS), len(LABELS)))
        np.add.at(pairs, (np.asarray(rows[:-1:2]), np.asarray(rows[1::2])), 1)
        of_both = pairs[np.ix_(possible, possible)]
        assert 1e-4 < scipy.stats.chisquare(of_both.ravel()).pvalue < 1 - 1e-4


@pytest.mark.proves("pool.draw_rows", 1)
def test_what_draws_depend_on():
    def rows(label, draw, seed=0):
        key = jax.random.key(seed)
        return np.asarray(draw_rows(key, jnp.asarray(label), POOL, 50, draw=draw))

    a, b = np.eye(3, dtype=np.float32)[:2]
    np.testing.assert_array_equal(rows(a, "uniform"), rows(b, "uniform"))
    np.testing.assert_array_equal(rows(a, "class"), rows(a, "class"))
    np.testing.assert_array_equal(rows(a, "class"), rows(0.4 * a + 0.3 * b, "class"))
    assert not np.intersect1d(rows(a, "class"), rows(b, "class")).size
    assert not np.array_equal(rows(a, "class"), rows(a, "class", seed=1))
    for bad in (np.nan, np.inf, -np.inf):  # still rows of the pool
        found = rows(a * 0 + np.float32(bad), "class")
        assert ((found >= 0) & (found < len(LABELS))).all()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:0], LABELS[:0], r"have shape \(0, 2, 2, 1\), .* M at least 1"),
        (IMAGES[0], LABELS, r"have shape \(2, 2, 1\)"),
        (IMAGES, LABELS[1:], r"their labels \(7,\): they must be"),
        (IMAGES, LABELS + 1, r"public labels are in \[1, 3\]: .* be in \[0, 3\)"),
        (IMAGES, LABELS - 1, r"public labels are in \[-1, 1\]"),
        (IMAGES, LABELS.astype(float), "public labels are float64: they must be int"),
        (
            IMAGES,
            LABELS.clip(1),
            "method.draw is 'class': every class must have a public image, but 'a' has",
        ),
    ],
)
def test_refuses(images, labels, message):
    with pytest.raises(UserError, match=message):
        make_pool(images, labels, "abc", draw="class")


def test_draws_are_known():
    with pytest.raises(UserError, match="draw is 'Class': it must be one of uniform, "):
        make_pool(IMAGES, LABELS, "abc", draw="Class")


def test_a_class_may_be_absent_from_uniform_draws():
    assert make_pool(IMAGES, LABELS.clip(1), "abc").ends.tolist() == [0, 0, 4, 8]


@pytest.mark.parametrize("own", [0, 1, 2])
def test_draws_of_an_absent_class_are_of_all(own):
    labels = np.where(own == LABELS, (own + 1) % 3, LABELS)
    rows = draw_rows(
        jax.random.key(0),
        jax.nn.one_hot(own, 3),
        make_pool(IMAGES, labels, "abc"),
        400,
        draw="class",
    )
    assert {*rows.tolist()} == {*range(len(labels))}
