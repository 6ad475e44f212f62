"""Gaussian noise that stays private in floating point.

Gaussian noise drawn in floats has holes: it takes so few values that whoever knows two
candidate sums can tell from the noisy sum to which of the two the noise was added
(Mironov, 2012; Haney et al., 2022). Here sums are rounded to a grid, the noise is a
discrete Gaussian on the same grid (Canonne et al., 2020), and the float sum of the two
is their exact sum rounded once. So the result is a function of the exact noisy sum, and
either candidate can produce every value.

Noise on a fine grid is Z = z0 + 64 z1 + 64^2 z2 + 64^3 z3 + 64^4 z4, where each z is a
discrete Gaussian of a standard deviation from 96 to 192 (Micciancio and Walter, 2017),
looked up in a table of exact integers. The words that decide it are a keystream of
ChaCha20 (RFC 8439), one block for each coordinate of each update, and another for the
key of the next update, so that a key tells nothing of the noise before it.
"""

import decimal
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpmix_jax.errors import require

_LEVELS, _BASE = 5, 64
_SPREAD = sum(_BASE ** (2 * level) for level in range(_LEVELS))  # of variances
_WIDEST = 192.0  # standard deviation of a z: 10.6 of them are in the table
_CELLS, _CELL_BITS = 4096, 84  # of the table, and bits that choose within a cell
_NOISE, _NEXT_KEY = (0, 0, 0), (1, 0, 0)  # nonces
_CHUNK = {"cpu": 2**12, None: 2**20}  # coordinates that are drawn at a time


class Grid(NamedTuple):
    """A grid, and the noise on it.

    Attributes:
      spacing: a power of two.
      stddev: of the noise, 2^30 to 2^32 spacings.
    """

    spacing: float
    stddev: float


def grid(noise_multiplier: float, sensitivity: float, size: int) -> Grid:
    """Returns the finest grid that the table reaches, and the noise on it.

    Rounding moves each coordinate by at most half a spacing, so two sums that were
    `sensitivity` apart come out at most sqrt(size) spacings further apart. The noise
    is scaled by that, too: a millionth more for a million coordinates.

    Args:
      noise_multiplier: standard deviation over sensitivity, positive.
      sensitivity: L2 distance of neighbouring sums, positive.
      size: number of coordinates, at most 2^32.

    Raises:
      UserError: for so much noise, or so many coordinates, that rounding would cost
        more than the noise.
    """
    noise_multiplier, sensitivity = float(noise_multiplier), float(sensitivity)
    reach, root = _WIDEST * math.sqrt(_SPREAD), math.sqrt(max(size, 1))
    most = 0.5 * reach / root
    require(size <= 2**32, "the number of parameters", size, "at most 2^32")
    require(
        0 < noise_multiplier <= most,
        "noise_multiplier",
        noise_multiplier,
        f"positive and at most {most:.4g} for {size:,} parameters",
    )
    least = noise_multiplier * sensitivity / (reach - noise_multiplier * root)
    spacing = 2.0 ** math.ceil(math.log2(least))
    return Grid(spacing, noise_multiplier * (sensitivity + spacing * root))


def total_variation(num_draws: float) -> float:
    """Returns how far the noise of a run is from Gaussian noise rounded to the grid.

    Rounding to the grid is post-processing, so what the accountant says of Gaussian
    noise holds for that. docs/assurance.md has the proof.

    Args:
      num_draws: coordinates times updates.
    """
    # Pinsker's inequality for two chi-square distances a draw: 1 / (288 s^4) between a
    # rounded and a discrete Gaussian, s >= 96 * 64^4 spacings, and (4.2e-19)^2 between
    # a discrete Gaussian and Z. The table leaves out less than 2^-80 a draw.
    least = 0.5 * _WIDEST * _BASE ** (_LEVELS - 1)
    return math.sqrt(num_draws) * (1 / (24 * least**2) + 4e-19) + num_draws * 2.0**-80


def extra_delta(epsilon: float, num_draws: float) -> float:
    """Returns what `total_variation` adds to delta: (1 + e^epsilon) times as much."""
    return (1 + math.exp(min(epsilon, 700.0))) * total_variation(num_draws)


def add_noise(total: jax.Array, key: jax.Array, on: Grid) -> jax.Array:
    """Adds a discrete Gaussian to each coordinate of a sum.

    Formal guarantees:
      - The result is a function of the exact sum of the rounded `total` and the noise.
      - Coordinate j of update t has a keystream block of its own, for up to 2^32
        coordinates.

    Args:
      total: float32 [d].
      key: uint32 [8], of this update alone, see `next_key`.
      on: from `grid`, of d coordinates.

    Returns:
      float32 [d].
    """
    size = total.shape[0]
    table = jnp.asarray(_table(on.stddev / on.spacing))

    def of_chunk(start_and_total):
        start, part = start_and_total
        counters = start + jnp.arange(part.shape[0], dtype=jnp.uint32)
        words = keystream(key, counters, _NOISE)
        low, high = _draw(table, words)
        rounded = jnp.round(part * jnp.float32(1 / on.spacing))
        return _rounded_once(rounded, high, low) * jnp.float32(on.spacing)

    def in_chunks(total, chunk):
        if size <= chunk:
            return of_chunk((jnp.uint32(0), total))
        number = -(-size // chunk)
        parts = jnp.pad(total, (0, number * chunk - size)).reshape(number, chunk)
        starts = jnp.arange(number, dtype=jnp.uint32) * jnp.uint32(chunk)
        return jax.lax.map(of_chunk, (starts, parts)).reshape(-1)[:size]

    if size <= min(_CHUNK.values()):
        return in_chunks(total, size)
    return jax.lax.platform_dependent(
        total,
        cpu=functools.partial(in_chunks, chunk=_CHUNK["cpu"]),
        default=functools.partial(in_chunks, chunk=_CHUNK[None]),
    )


def _rounded_once(a, b, c):
    """Returns the float nearest to a + b + c (Boldo and Melquiond, 2008, Figure 8)."""
    upper, lower = _two_sum(b, c)
    first, rest = _two_sum(a, upper)
    return first + _odd_sum(rest, lower)


def _two_sum(a, b):
    """Returns the float nearest to a + b, and exactly what it leaves out (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _odd_sum(a, b):
    """Returns a + b, or if it is no float the neighbour whose last bit is 1."""
    total, rest = _two_sum(a, b)
    bits = jax.lax.bitcast_convert_type(total, jnp.int32)
    away = jnp.where((rest > 0) == (total > 0), 1, -1)
    even = (rest != 0) & (bits & 1 == 0)
    return jax.lax.bitcast_convert_type(jnp.where(even, bits + away, bits), jnp.float32)


def _draw(table, words):
    """Returns z0 + 64 z1 + 64^2 z2 and 64^3 (z3 + 64 z4), float32 [n].

    Both are integers with less than 24 bits, but for the power of two: exact.
    """
    z = [_look_up(table, *words[3 * i : 3 * i + 3]) for i in range(_LEVELS)]
    low, high = z[0] + _BASE * (z[1] + _BASE * z[2]), z[3] + _BASE * z[4]
    return low.astype(jnp.float32), high.astype(jnp.float32) * jnp.float32(_BASE**3)


def _look_up(table, first, second, third):
    """Draws a z from a table of cells that hold two values each.

    The first 12 bits choose the cell, the next 84 the cell's own value or the other.
    """
    cell = first >> 20
    row = jnp.take(table, cell.astype(jnp.int32), axis=0)
    first = first & jnp.uint32(2**20 - 1)
    last = third < row[:, 2]
    middle = (second < row[:, 1]) | ((second == row[:, 1]) & last)
    own = (first < row[:, 0]) | ((first == row[:, 0]) & middle)
    value = jnp.where(own, cell, row[:, 3])
    return value.astype(jnp.int32) - _CELLS // 2


@functools.lru_cache(maxsize=16)
def _table(stddev: float) -> np.ndarray:
    """Returns the table for a Z of this standard deviation, in spacings.

    Returns:
      uint32 [4096, 4]: a bound of 20, 32 and 32 bits, and the value that is drawn
      above it, plus 2048.
    """
    cells, half = _alias(masses(stddev)), 2**32
    rows = [(t >> 64, (t >> 32) % half, t % half, alias) for t, alias in cells]
    return np.array(rows, np.uint32)


def masses(stddev: float) -> list[int]:
    """Returns the distribution of one z, for values from -2048 to 2047.

    Args:
      stddev: of Z, in spacings.

    Returns:
      4,096 integers that add up to 2^96, each within 1 of its share, but for that of
      0, which takes what is left.
    """
    total, half = 2 ** (12 + _CELL_BITS), _CELLS // 2
    with decimal.localcontext(prec=60):
        variance = decimal.Decimal(stddev) ** 2 / _SPREAD
        step = (-1 / variance).exp()
        weights, factor = [decimal.Decimal(1)], (-1 / (2 * variance)).exp()
        for _ in range(half - 1):  # exp(-k^2 / 2v), from the one before
            weights.append(weights[-1] * factor)
            factor *= step
        unit = total / (2 * sum(weights) - 1)
        upper = [int(weight * unit) for weight in weights]
    shares = [0, *upper[:0:-1], *upper]
    shares[half] += total - sum(shares)
    return shares


def _alias(shares: list[int]) -> list[tuple[int, int]]:
    """Divides shares over cells of one size, two values a cell (Walker, 1977).

    Returns:
      For each cell how much of it is its own value's, and which value has the rest.
    """
    size = sum(shares) // len(shares)
    left = list(shares)
    cells = [(0, value) for value in range(len(shares))]
    small = [value for value, share in enumerate(left) if share < size]
    large = [value for value, share in enumerate(left) if share >= size]
    while small:
        value, giver = small.pop(), large[-1]
        cells[value] = (left[value], giver)
        left[giver] -= size - left[value]
        if left[giver] < size:
            small.append(large.pop())
    return cells  # those of `large` are their own, which (0, value) says


def next_key(key: jax.Array) -> jax.Array:
    """Returns the key of the next update, which tells nothing of the one before it.

    Formal guarantees:
      - It is half of a keystream block of `key` that no noise is made of.
    """
    return keystream(key, jnp.zeros(1, jnp.uint32), _NEXT_KEY)[:8, 0]


def keystream(key: jax.Array, counters: jax.Array, nonce: Sequence[int]) -> jax.Array:
    """Returns blocks of ChaCha20 (RFC 8439, Section 2.3).

    Args:
      key: uint32 [8].
      counters: uint32 [n], of the blocks.
      nonce: three words.

    Returns:
      uint32 [16, n].
    """
    shape = (4, *counters.shape)
    constant = np.frombuffer(b"expand 32-byte k", "<u4").astype(np.uint32)
    words = [jnp.asarray(constant), key[:4], key[4:]]
    last = jnp.broadcast_to(np.array(nonce, np.uint32)[:, None], (3, *counters.shape))
    start = (
        *(jnp.broadcast_to(part[:, None], shape) for part in words),
        jnp.concatenate([counters[None], last]),
    )

    def double_round(_, rows):
        a, b, c, d = _quarter_rounds(*rows)
        turned = (jnp.roll(row, -i, axis=0) for i, row in enumerate((a, b, c, d)))
        a, b, c, d = _quarter_rounds(*turned)
        return tuple(jnp.roll(row, i, axis=0) for i, row in enumerate((a, b, c, d)))

    rows = jax.lax.fori_loop(0, 10, double_round, start)
    return jnp.concatenate(
        [row + first for row, first in zip(rows, start, strict=True)]
    )


def _quarter_rounds(a, b, c, d):
    def rotated(x, bits):
        return (x << bits) | (x >> (32 - bits))

    for first, second in ((16, 12), (8, 7)):
        a = a + b
        d = rotated(d ^ a, first)
        c = c + d
        b = rotated(b ^ c, second)
    return a, b, c, d
