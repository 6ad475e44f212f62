"""Noise on a grid: exact tables, exact sums, and what floats gave away before."""

import decimal
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dpmix_jax import UserError, noise, noise_key, sampling

GRID = noise.grid(2.0, 0.7, 1000)
KEY = noise_key(5)


# --- The generator ----------------------------------------------------------------


def block(key, counter, nonce):
    counters = jnp.array([counter], jnp.uint32)
    words = noise.keystream(jnp.asarray(np.frombuffer(key, "<u4")), counters, nonce)
    return np.asarray(words)[:, 0].astype("<u4").tobytes().hex()


def test_keystream_is_chacha20():
    """RFC 8439: the example of Section 2.3.2, and test vectors 1 and 2 of A.1."""
    nonce = np.frombuffer(bytes.fromhex("000000090000004a00000000"), "<u4")
    assert block(bytes(range(32)), 1, nonce) == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    assert block(bytes(32), 0, (0, 0, 0)) == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    assert block(bytes(32), 1, (0, 0, 0)) == (
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )


def test_keys_of_seeds_are_distinct():
    seeds = (0, 1, 2**64, 2**128, 2**255 + 3, 2**256 - 1)
    keys = {noise_key(seed).tobytes() for seed in seeds}
    assert len(keys) == len(seeds)
    assert all(len(key) == 32 for key in keys)
    assert noise_key(np.int64(1)).tobytes() == noise_key(1).tobytes()
    assert "noise" not in sampling.STREAMS
    with pytest.raises(UserError, match="seed is -1: it must be at least 0"):
        noise_key(-1)
    with pytest.raises(TypeError):
        noise_key(2.7)


@pytest.mark.proves("noise.next_key", 1)
def test_the_next_key_is_none_of_the_noise():
    following = noise.next_key(KEY)
    expected = block(KEY.tobytes(), 0, (1, 0, 0))[:64]
    assert np.asarray(following).astype("<u4").tobytes().hex() == expected
    of_noise = noise.keystream(KEY, jnp.arange(1000, dtype=jnp.uint32), noise._NOISE)
    assert not set(np.asarray(following).tolist()) & set(np.ravel(of_noise).tolist())


# --- The table --------------------------------------------------------------------

SPREADS = [Fraction(96), Fraction(1234567, 9876), Fraction(192)]


@pytest.mark.parametrize("spread", SPREADS)
def test_masses_are_those_of_a_discrete_gaussian(spread):
    """Against sums of exponentials at twice the digits."""
    stddev = float(spread) * math.sqrt(noise._SPREAD)
    found = noise.masses(stddev)
    assert sum(found) == 2**96
    with decimal.localcontext(prec=120):
        variance = decimal.Decimal(stddev) ** 2 / (1 + 64**2 + 64**4 + 64**6 + 64**8)
        weights = [
            (-decimal.Decimal(k * k) / (2 * variance)).exp() for k in range(2048)
        ]
        unit = 2**96 / (2 * sum(weights) - weights[0])
        for k in range(-2047, 2048):
            slack = 4096 if k == 0 else 1  # what is left over by the others
            assert abs(found[k + 2048] - weights[abs(k)] * unit) <= slack
    assert found[0] == 0
    # What is not in the table: less than 1e-25 of a discrete Gaussian.
    assert math.erfc(2047.5 / float(spread) / math.sqrt(2)) < 1e-25


@pytest.mark.parametrize("spread", SPREADS)
def test_cells_hold_exactly_the_masses(spread):
    stddev = float(spread) * math.sqrt(noise._SPREAD)
    drawn = [0] * 4096
    for cell, (first, second, third, other) in enumerate(noise._table(stddev).tolist()):
        bound = (first << 64) + (second << 32) + third
        drawn[cell] += bound
        drawn[other] += 2**84 - bound
    assert drawn == noise.masses(stddev)


def test_a_cell_gives_its_own_value_below_the_bound_and_another_from_it():
    table = np.zeros((4096, 4), np.uint32)
    table[9] = (5, 6, 7, 4000)
    words = [
        (bits, second, third)
        for bits in (4, 5, 6)
        for second in (5, 6, 7)
        for third in (6, 7, 8)
    ]
    first, second, third = (
        np.array(part, np.uint32) for part in zip(*words, strict=True)
    )
    found = noise._look_up(
        jnp.asarray(table), first + np.uint32(9 << 20), second, third
    )
    expected = [9 - 2048 if word < (5, 6, 7) else 4000 - 2048 for word in words]
    assert found.tolist() == expected


# --- The sum ----------------------------------------------------------------------


def nearest(whole: int) -> float:
    """Rounds to 24 bits, ties to even, by integers alone."""
    unit = 2 ** max(whole.bit_length() - 24, 0)
    return float(round(Fraction(whole, unit)) * unit)


WHOLE = st.integers(-(2**24), 2**24)


@pytest.mark.proves("noise.add_noise", 1)
@given(WHOLE, st.integers(0, 60), st.integers(-(2**18), 2**18), WHOLE)
@example(1, 59, 2**17, 1)  # no tie, but 2^35 + 1 has no float, and 2^35 would be
@example(3, 59, 2**17, -1)
def test_sums_are_rounded_once(mantissa, exponent, high, low):
    whole = mantissa * 2**exponent, high * 64**3, low
    floats = [jnp.float32(value) for value in whole]
    assert float(jax.jit(noise._rounded_once)(*floats)) == nearest(sum(whole))


@pytest.mark.proves("noise.add_noise", 1)
@pytest.mark.parametrize("scale", [0.0, 0.3, 1e3, 1e9])
def test_the_result_is_the_exact_noisy_sum_rounded(scale):
    total = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    total *= np.float32(scale)
    found = jax.jit(lambda x: noise.add_noise(x, KEY, GRID))(total)
    words = noise.keystream(KEY, jnp.arange(1000, dtype=jnp.uint32), noise._NOISE)
    low, high = noise._draw(
        jnp.asarray(noise._table(GRID.stddev / GRID.spacing)), words
    )
    for x, a, b, noisy in zip(total, low, high, found, strict=True):
        on_grid = round(Fraction(float(x)) / Fraction(GRID.spacing))
        assert float(noisy) == nearest(on_grid + int(a) + int(b)) * GRID.spacing


@pytest.mark.sampled("9000")
@pytest.mark.proves("noise.add_noise", 2)
@pytest.mark.parametrize("size", [1, 1000, 9000])
def test_each_coordinate_has_a_block_of_its_own(size, monkeypatch):
    def draw(size, key=KEY):
        on = noise.grid(1.0, 1.0, 9000)
        zeros = jnp.zeros(size, jnp.float32)
        return np.asarray(noise.add_noise(zeros, key, on))

    found = draw(size)
    np.testing.assert_array_equal(draw(9000)[:size], found)
    assert np.mean(draw(9000, key=noise.next_key(KEY))[:size] == found) < 0.01
    assert np.mean(draw(9000, key=noise_key(6))[:size] == found) < 0.01
    assert len(np.unique(found)) > 0.99 * size  # none repeats in another chunk
    monkeypatch.setattr(noise, "_CHUNK", {"cpu": 2**20, None: 2**20})
    np.testing.assert_array_equal(draw(size), found)


def test_samples_are_gaussian():
    size = 200_000
    on = noise.grid(3.0, 0.1, size)
    zeros = jnp.zeros(size, jnp.float32)
    samples = np.asarray(noise.add_noise(zeros, KEY, on), np.float64)
    samples /= on.stddev
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) - moment**2)
        error = abs(np.mean(samples**power) - moment)
        assert error < 5 * spread / math.sqrt(size), power
    ordered = np.sort(samples)
    phi = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in ordered])
    distance = np.abs(phi - (np.arange(size) + 0.5) / size).max()
    assert distance < 2.2 / math.sqrt(size)  # Kolmogorov and Smirnov, at 1e-4


# --- The grid ---------------------------------------------------------------------


@given(
    st.floats(0.01, 1000.0),
    st.floats(1e-10, 1e10),
    st.integers(1, 10**7),
)
def test_a_grid_is_fine_enough_for_the_noise(noise_multiplier, sensitivity, size):
    on = noise.grid(noise_multiplier, sensitivity, size)
    assert math.frexp(on.spacing)[0] == 0.5  # a power of two
    exact = noise_multiplier * (sensitivity + on.spacing * math.sqrt(size))
    assert on.stddev == pytest.approx(exact, rel=1e-12)
    of_one = on.stddev / on.spacing / math.sqrt(noise._SPREAD)
    assert 96 <= of_one <= 192.0001
    # What rounding costs: with 2.75 million parameters at sigma = 10, 2e-5.
    cost = noise_multiplier * math.sqrt(size) * 2.0**-30
    assert on.stddev <= noise_multiplier * sensitivity * (1 + 2 * cost) or cost > 0.1


def test_rounding_is_within_what_the_grid_adds():
    rng = np.random.default_rng(2)
    size = 1000
    on = noise.grid(2.0, 0.7, size)
    for _ in range(20):
        first = rng.normal(size=size) * 3
        change = rng.normal(size=size)
        second = first + 0.7 * change / np.linalg.norm(change)
        rounded = [np.round(x / on.spacing) * on.spacing for x in (first, second)]
        distance = np.linalg.norm(rounded[0] - rounded[1])
        assert distance <= 0.7 + on.spacing * math.sqrt(size)


@pytest.mark.parametrize(
    ("noise_multiplier", "size", "message"),
    [
        (0.0, 10, "noise_multiplier is 0.0: it must be positive and at most"),
        (math.nan, 10, "noise_multiplier is nan"),
        (1e9, 10, "noise_multiplier is 1000000000.0: it must be positive and at most"),
        (1.0, 2**32 + 1, "the number of parameters is 4294967297: it must be at most"),
    ],
)
def test_refuses(noise_multiplier, size, message):
    with pytest.raises(UserError, match=message):
        noise.grid(noise_multiplier, 1.0, size)


def test_total_variation_is_that_of_the_sum_of_chi_squares():
    """The chi-square distance of one coordinate, by its sum, at a coarser grid."""
    s = 12.0
    k = np.arange(-12 * int(s), 12 * int(s) + 1)
    edges = [math.erf(x / (s * math.sqrt(2))) for x in (*(k - 0.5), k[-1] + 0.5)]
    rounded = np.diff(edges) / 2
    discrete = np.exp(-(k**2) / (2 * s**2))
    discrete /= discrete.sum()
    middle = np.abs(k) <= 6 * s
    chi_square = np.sum(((rounded - discrete) ** 2 / discrete)[middle])
    assert chi_square == pytest.approx(1 / (288 * s**4), rel=0.02)
    # Pinsker: sqrt(n chi_square / 2), at the least number of spacings there can be.
    of_grid = math.sqrt(1 / 288 / (96 * 64**4) ** 4 / 2)
    # A sum of z and 64 z' is Gaussian but for relative 2 exp(-2 pi^2 v), v the variance
    # of z in units of 64^2, conditioned on the sum; four times.
    spread = 1 / (1 / 96**2 + 1 / (64 * 96) ** 2) / 64**2
    of_convolution = 4 * 2 * math.exp(-2 * math.pi**2 * spread) / math.sqrt(2)
    of_table = 5 * (math.erfc(2047.5 / 192 / math.sqrt(2)) + 4096 * 2.0**-97)
    for draws in (1e4, 1e9, 1e13):
        exact = math.sqrt(draws) * (of_grid + of_convolution) + draws * of_table
        assert exact <= noise.total_variation(draws) <= 4 * exact
    assert noise.total_variation(1e9) < 1e-13
    assert noise.extra_delta(3.0, 1e9) == (1 + math.exp(3)) * noise.total_variation(1e9)
    assert math.isfinite(noise.extra_delta(1e5, 1e9))


# --- What floats give away --------------------------------------------------------

SIGMA, SIZE = 10.0, 3000
LOWEST = np.nextafter(np.float32(-1), np.float32(0), dtype=np.float32)
ROOT_2 = np.float32(np.sqrt(2))


def neighbours(seed):
    """Two sums at a distance of 1."""
    rng = np.random.default_rng(seed)
    first, change = rng.normal(size=(2, SIZE))
    second = first + change / np.linalg.norm(change)
    return jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32)


@jax.jit
def with_floats(total, seed):
    """As jax_privacy, and this package before, add noise."""
    return total + jnp.float32(SIGMA) * jax.random.normal(jax.random.key(seed), (SIZE,))


@jax.jit
def with_grid(total, seed):
    on = noise.grid(SIGMA, 1.0, SIZE)
    return noise.add_noise(total, seed, on)


@jax.jit
def explained(noisy, total):
    """How many coordinates some float of `jax.random.normal` takes from `total`.

    Such a float is sqrt(2) erf_inv of one of 2^23 numbers; tried are those near by.
    """
    near = (noisy - total) / jnp.float32(SIGMA)
    place = (jax.scipy.special.erf(near / ROOT_2) - LOWEST) / (1 - LOWEST)
    tried = jnp.round(place * 2**23)[:, None] + jnp.arange(-20.0, 21.0)[None]
    uniform = jnp.maximum(LOWEST, tried / 2**23 * (1 - LOWEST) + LOWEST)
    floats = ROOT_2 * jax.lax.erf_inv(uniform)
    found = total[:, None] + jnp.float32(SIGMA) * floats == noisy[:, None]
    return found.any(axis=1).sum()


def told_apart(add, keys):
    """How often the attack names the sum that was released, of two each."""
    right = 0
    for seed, key in enumerate(keys):
        pair = neighbours(seed)
        for true in (0, 1):
            noisy = add(pair[true], key)
            counts = [int(explained(noisy, total)) for total in pair]
            right += counts[true] > counts[1 - true]
    return right


@pytest.mark.proves("noise.add_noise", 1)
def test_nobody_can_tell_by_the_last_bits_which_sum_was_released():
    """Floats give it away 40 times of 40 (Mironov, 2012); the grid, as a coin would."""
    assert told_apart(with_floats, range(20)) == 40
    assert 8 <= told_apart(with_grid, map(noise_key, range(20))) <= 32


@pytest.mark.proves("noise.add_noise", 1)
def test_either_sum_explains_every_coordinate():
    on = noise.grid(SIGMA, 1.0, SIZE)
    first, second = neighbours(0)
    noisy = np.asarray(with_grid(first, noise_key(0)), np.float64) / on.spacing
    for total in (first, second):
        rounded = np.round(np.asarray(total, np.float64) / on.spacing)
        needed = noisy - rounded  # a point of the grid for each coordinate
        np.testing.assert_array_equal(needed, np.round(needed))
