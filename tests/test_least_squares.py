"""Private least squares: moments on neighbours, their noise, and what is solved."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from dp_accounting import NeighboringRelation

from dpmix_jax import Mechanism, UserError, check_sensitivity, noise_key
from dpmix_jax import calibrate as calibrate_updates
from dpmix_jax.baselines import least_squares
from dpmix_jax.baselines.least_squares import (
    Moments,
    clipped_moments,
    fit,
    private_moments,
    solve,
)

N, D, NUM_CLASSES = 12, 7, 3
ONE, REPLACED = (
    NeighboringRelation.ADD_OR_REMOVE_ONE,
    NeighboringRelation.REPLACE_ONE,
)


def calibrate(epsilon, delta):
    """Returns one query of all records."""
    return calibrate_updates(
        epsilon=epsilon, delta=delta, sampling_prob=1.0, num_updates=1
    )


def records(num=N, size=D):
    """Features of norms below and above 1, and one-hot labels."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(num, size)) * rng.uniform(0.1, 2, (num, 1))
    return features.astype(np.float32), np.eye(NUM_CLASSES, dtype=np.float32)[
        np.arange(num) % NUM_CLASSES
    ]


def matrix_of(second):
    """The matrix by a plain loop over the triangle, and its factor."""
    size, found = D, iter(np.asarray(second, np.float64))
    matrix = np.zeros((size, size))
    for i in range(size):
        for j in range(i, size):
            value = next(found)
            matrix[i, j] = matrix[j, i] = value if i == j else value / math.sqrt(2)
    assert next(found, None) is None
    return matrix


@pytest.mark.sampled("1.0")
@pytest.mark.parametrize("l2_clip_norm", [0.01, 1.0, 100.0])
def test_moments_are_those_of_the_loop(l2_clip_norm):
    features, labels = records()
    moments_fn = clipped_moments(l2_clip_norm, 100)
    found = jax.jit(moments_fn)(features, labels)
    outer, cross = np.zeros((D, D)), np.zeros((D, NUM_CLASSES))
    for x, y in zip(features.astype(np.float64), labels, strict=True):
        x = x * min(1, l2_clip_norm / np.linalg.norm(x)) / l2_clip_norm
        outer += np.outer(x, x)
        cross += np.outer(x, y)
    np.testing.assert_allclose(matrix_of(found.second), outer, atol=1e-5)
    np.testing.assert_allclose(found.cross, cross, atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(found.second), np.linalg.norm(outer), rtol=1e-5
    )
    eager = moments_fn(features, labels)
    for here, there in zip(found, eager, strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-6)


@pytest.mark.proves("baselines.least_squares.clipped_moments", 1, 2)
@pytest.mark.parametrize("l2_clip_norm", [1e-10, 1.0, 1e10])
def test_neighbours_move_moments_by_the_sensitivity_at_most(l2_clip_norm):
    """Features and labels both NaN, infinite, huge; and some do move them as far."""
    moments_fn = clipped_moments(l2_clip_norm, N)
    assert moments_fn.sensitivity(ONE) == pytest.approx(math.sqrt(2), rel=1e-5)
    doubled = pytest.approx(2 * math.sqrt(2), rel=1e-5)
    assert moments_fn.sensitivity(REPLACED) == doubled
    features, labels = records()
    query = jax.jit(moments_fn)

    def clipped_sum(records, is_padding):
        return query(*records, is_padding)

    moved = check_sensitivity(
        clipped_sum, (features * l2_clip_norm, labels), moments_fn.sensitivity
    )
    assert len(moved) > 100
    assert max(moved.values()) > math.sqrt(2) * (1 - 1e-5)


@pytest.mark.proves("baselines.least_squares.clipped_moments", 1)
def test_many_records_alike_move_moments_no_further():
    """Sums of floats would be off by a hundredth of a term here."""
    number, size = 50_000, 64
    rng = np.random.default_rng(0)
    features = (1 + 0.01 * rng.normal(size=(number, size))).astype(np.float32)
    labels = np.eye(2, dtype=np.float32)[np.zeros(number, int)]
    moments_fn = clipped_moments(1.0, number)
    query = jax.jit(moments_fn)
    blank = np.zeros(number, bool)
    for index in (0, number - 1):
        whole, rest = (
            query(features, labels, padding)
            for padding in (blank, np.arange(number) == index)
        )
        moved, missed = (
            np.linalg.norm(
                np.concatenate([np.ravel(a - b - c) for a, b, c in parts]), ord=2
            )
            for parts in (
                [(a, b, 0) for a, b in zip(whole, rest, strict=True)],
                zip(whole, rest, query(*_one(features, labels, index)), strict=True),
            )
        )
        assert moved <= moments_fn.sensitivity(ONE)
        assert missed <= moments_fn.sensitivity(ONE) - math.sqrt(2) + 1e-5
    assert moments_fn.sensitivity(ONE) < 1.01 * math.sqrt(2)
    with pytest.raises(UserError, match=r"records is 50000: it must be at most 9"):
        clipped_moments(1.0, 9)(features, labels)


def _one(features, labels, index):
    return features[index : index + 1], labels[index : index + 1]


def test_no_key_is_compiled_into_the_query(monkeypatch):
    """JAX keeps compiled code on disk, with what functions close over."""
    texts, jit = [], jax.jit

    def spying(function):
        compiled = jit(function)

        def call(*args):
            texts.append(compiled.lower(*args).as_text())
            return compiled(*args)

        return call

    monkeypatch.setattr(least_squares.jax, "jit", spying)
    key = noise_key(1234)
    private_moments(
        *records(),
        l2_clip_norm=1.0,
        mechanism=Mechanism(sampling_prob=1.0, num_updates=1, noise_multiplier=1.0),
        key=key,
    )
    assert texts
    for word in np.asarray(key).tolist():
        assert str(word) not in texts[0]
        assert f"{word:08X}" not in texts[0].upper()


def test_records_far_apart_move_moments_by_the_root_of_four():
    """x and x' at right angles, of other labels: the terms are so as well."""
    moments_fn = clipped_moments(2.0, 100)
    x, y = (
        1e30 * np.eye(2, D, dtype=np.float32),
        np.eye(2, NUM_CLASSES, dtype=np.float32),
    )
    one, other = (moments_fn(x[i : i + 1], y[i : i + 1]) for i in range(2))
    distances = [np.linalg.norm(a - b) for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(distances, math.sqrt(2), rtol=1e-6)
    assert np.hypot(*distances) <= moments_fn.sensitivity(REPLACED)


@pytest.mark.proves("baselines.least_squares.clipped_moments", 3)
def test_padding_is_exactly_nothing():
    features, labels = records()
    features[4:], labels[4:] = np.nan, 1e30
    moments_fn = jax.jit(clipped_moments(1.0, 100))
    found = moments_fn(features, labels, np.arange(N) >= 4)
    features[4:] = labels[4:] = 7.0
    for here, there in zip(
        found, moments_fn(features, labels, np.arange(N) >= 4), strict=True
    ):
        np.testing.assert_array_equal(here, there)
    nothing = moments_fn(features, labels, np.ones(N, bool))
    assert not any(np.any(part) for part in nothing)


@pytest.mark.proves("baselines.least_squares.private_moments", 1)
@pytest.mark.parametrize("relation", [ONE, REPLACED])
def test_noise_is_of_the_stated_deviation_on_every_number(relation):
    """On moments that are known, so that what is left is noise; of a chi-square's."""
    size, num_classes = 150, 40
    features, labels = np.zeros((2, size)), np.zeros((2, num_classes))
    features[:, 3] = labels[:, 5] = 1e9
    mechanism = Mechanism(
        sampling_prob=1.0,
        num_updates=1,
        noise_multiplier=2.0,
        neighboring_relation=relation,
    )
    noisy, stddev = private_moments(
        features, labels, l2_clip_norm=0.5, mechanism=mechanism, key=noise_key(1)
    )
    changes = 1 if relation == ONE else 2
    assert stddev == pytest.approx(mechanism.noise_multiplier * changes * 2**0.5)
    exact = clipped_moments(0.5, 100)(features, labels)
    assert exact.cross[3, 5] == 2.0
    on_diagonal = np.arange(size) == np.arange(size)[:, None]
    on_diagonal = on_diagonal[np.triu_indices(size)]
    rest = np.asarray(noisy.second - exact.second)
    parts = {
        "diagonal": rest[on_diagonal],
        "off it": rest[~on_diagonal],
        "cross": np.ravel(noisy.cross - exact.cross),
    }
    for name, found in parts.items():
        chi_square = np.square(found / stddev).sum()
        p = scipy.stats.chi2.cdf(chi_square, len(found))
        assert 1e-4 < p < 1 - 1e-4, name
    both = np.concatenate(list(parts.values()))
    assert len(np.unique(both)) > 0.99 * len(both)
    matrix = least_squares._unpacked(np.asarray(noisy.second - exact.second))
    np.testing.assert_array_equal(matrix, matrix.T)
    ratio = matrix[np.triu_indices(size, 1)].std() / stddev
    assert ratio == pytest.approx(2**-0.5, rel=0.03)


def delta_of(epsilon, mu):
    """Of a Gaussian mechanism of sensitivity mu (Balle and Wang, 2018, Theorem 8)."""
    cdf = scipy.stats.norm.cdf
    low = math.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)
    return cdf(mu / 2 - epsilon / mu) - low


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(0.1, 1e-8), (1, 1e-5), pytest.param(8, 1e-5, marks=pytest.mark.slow)],
)
def test_the_noise_is_that_of_the_closed_form(epsilon, delta):
    """Of two moments of norm 1 each, under noise of one deviation, composed."""
    mechanism = calibrate(epsilon, delta)
    stddev = mechanism.noise_multiplier * clipped_moments(1.0, 100).sensitivity(ONE)
    each = 1 / stddev
    least = scipy.optimize.brentq(
        lambda mu: delta_of(epsilon, mu) - delta, 1e-3, 20, xtol=1e-12
    )
    assert np.hypot(each, each) == pytest.approx(least, rel=1e-3)
    assert delta_of(epsilon, np.hypot(each, each)) <= delta * (1 + 1e-6)


@pytest.mark.sampled
def test_golden_multipliers():
    """By `delta_of` and scipy's brentq, of the sum of both; scipy 1.17."""
    for epsilon, expected in ((1.0, 3.730632), (3.0, 1.390500), (8.0, 0.600145)):
        found = calibrate(epsilon, 1e-5).noise_multiplier
        assert found == pytest.approx(expected, rel=1e-3)


def test_other_mechanisms_are_refused():
    features, labels = records()
    wrong = Mechanism(sampling_prob=0.5, num_updates=1, noise_multiplier=1.0)
    with pytest.raises(UserError) as error:
        fit(features, labels, l2_clip_norm=1.0, mechanism=wrong, key=noise_key(0))
    assert str(error.value) == (
        "(sampling_prob, num_updates) is (0.5, 1): it must be (1.0, 1), one query of"
        " all records"
    )
    with pytest.raises(UserError, match="l2_clip_norm is 0"):
        clipped_moments(0, 100)
    with pytest.raises(UserError, match=r"the shape of labels is \(12,\): it must be"):
        clipped_moments(1.0, 100)(features, labels[:, 0])


def test_the_solution_is_that_of_ridge_regression():
    features, labels = records()
    moments = clipped_moments(100.0, 100)(features, labels)
    stddev, x = 0.003, features.astype(np.float64) / 100
    ridge = stddev * math.sqrt(2 * D)
    expected = np.linalg.solve(x.T @ x + ridge * np.eye(D), x.T @ labels)
    np.testing.assert_allclose(solve(moments, stddev), expected, rtol=1e-4, atol=1e-6)


def test_negative_eigenvalues_count_as_none():
    """Along such an axis weights are b over the ridge, however negative it is."""
    second = np.zeros((D, D))
    second[0, 0], second[1, 1] = -1e6, 5.0
    packed = jnp.asarray(second[np.triu_indices(D)])
    weights = solve(Moments(packed, jnp.ones((D, NUM_CLASSES))), stddev=1.0)
    ridge = math.sqrt(2 * D)
    expected = np.full((D, NUM_CLASSES), 1 / ridge)
    expected[1] = 1 / (5 + ridge)
    np.testing.assert_allclose(weights, expected)


def test_the_ridge_is_the_largest_eigenvalue_of_noise():
    size = 400
    packed = np.random.default_rng(0).normal(size=size * (size + 1) // 2)
    largest = np.linalg.eigvalsh(least_squares._unpacked(packed))[-1]
    assert largest == pytest.approx(math.sqrt(2 * size), rel=0.05)


@pytest.mark.proves("baselines.least_squares.fit", 1)
def test_weights_are_a_function_of_the_moments(monkeypatch):
    """What the records are has no part in them once the moments are given."""
    mechanism, calls = calibrate(1.0, 1e-5), []
    fixed = clipped_moments(1.0, 100)(*records()), 0.5

    def given(features, labels, **kwargs):
        calls.append(kwargs)
        return fixed

    monkeypatch.setattr(least_squares, "private_moments", given)
    options = {"l2_clip_norm": 2.0, "mechanism": mechanism, "key": noise_key(0)}
    one = fit(*records(), **options)
    features, labels = records(num=5)
    other = fit(features * np.nan, labels[::-1], **options)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one, np.float32(solve(*fixed) / 2.0))
    assert calls == [options, options]  # one access each


def test_it_learns_and_weights_are_of_features_as_they_are():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, NUM_CLASSES, 2000)
    features = np.float32(
        50 * np.eye(NUM_CLASSES, D)[classes] + rng.normal(size=(2000, D))
    )
    weights = fit(
        features,
        np.eye(NUM_CLASSES)[classes],
        l2_clip_norm=50.0,
        mechanism=calibrate(1.0, 1e-5),
        key=noise_key(3),
    )
    assert weights.dtype == np.float32
    scores = features @ weights
    assert (scores.argmax(axis=1) == classes).mean() > 0.99
    assert scores.max(axis=1).mean() == pytest.approx(1, abs=0.1)  # one-hot, about
