import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dpmix_jax import (
    UserError,
    batches,
    microbatches,
    poisson_batch,
    record_keys,
    stream_key,
)
from dpmix_jax.sampling import STREAMS, generator

N, Q, STEPS = 40, 0.3, 3000


def poisson(seed, step):
    return poisson_batch(seed, step, num_records=N, sampling_prob=Q)


def shuffled(seed, step):
    """What a shuffling loader does instead: fixed-size batches, epoch by epoch."""
    size = int(N * Q)
    epoch, place = divmod(step, N // size)
    order = np.random.default_rng([seed, epoch]).permutation(N)
    return order[place * size : (place + 1) * size]


def drawn(sampler):
    """[STEPS, N] indicators of inclusion."""
    included = np.zeros((STEPS, N))
    for step in range(STEPS):
        included[step, sampler(0, step)] = 1
    return included


def p_values(included):
    """Two-sided p-values of what Poisson sampling means."""
    counts = included.sum(axis=0)
    spread = STEPS * Q * (1 - Q)
    frequencies = np.sum((counts - STEPS * Q) ** 2) / spread
    sizes = included.sum(axis=1)
    size_spread = np.sum((sizes - N * Q) ** 2) / (N * Q * (1 - Q))
    centred = (included - Q) / np.sqrt(Q * (1 - Q))
    pairs = (centred.T @ centred)[np.triu_indices(N, 1)] ** 2 / STEPS
    consecutive = (centred[1:] * centred[:-1]).sum(axis=0) ** 2 / STEPS
    return {
        "frequencies": two_sided(frequencies, N),
        "batch sizes": two_sided(size_spread, STEPS),
        "pairs": two_sided(pairs.sum(), len(pairs)),
        "consecutive steps": two_sided(consecutive.sum(), N),
    }


def two_sided(chi2, degrees):
    below = scipy.stats.chi2(degrees).cdf(chi2)
    return 2 * min(below, 1 - below)


@pytest.mark.proves("sampling.poisson_batch", 1)
def test_inclusion_is_independent_with_the_right_probability():
    assert min(p_values(drawn(poisson)).values()) > 1e-3


def test_the_check_catches_a_shuffled_loader_and_a_wrong_probability():
    assert min(p_values(drawn(shuffled)).values()) < 1e-9
    for wrong in (0.9 * Q, 1.1 * Q):
        batches = drawn(
            lambda seed, step, q=wrong: poisson_batch(
                seed, step, num_records=N, sampling_prob=q
            )
        )
        assert min(p_values(batches).values()) < 1e-9


@pytest.mark.proves("sampling.poisson_batch", 2)
def test_a_batch_is_a_function_of_seed_and_step():
    for step in (0, 7, 10**6):
        np.testing.assert_array_equal(poisson(5, step), poisson(5, step))
    assert len({poisson(5, step).tobytes() for step in range(50)}) == 50
    assert len({poisson(seed, 3).tobytes() for seed in range(50)}) == 50
    assert poisson(2**127 + 1, 0).tobytes() != poisson(1, 0).tobytes()


@pytest.mark.parametrize(("q", "size"), [(0.0, 0), (1.0, 200)])
def test_extreme_probabilities(q, size):
    batch = poisson_batch(0, 0, num_records=200, sampling_prob=q)
    assert len(set(batch.tolist())) == len(batch) == size


@pytest.mark.parametrize("num", [0, 1, 4, 5, 8, 9])
def test_microbatches_have_one_shape_and_lose_nothing(num):
    parts = microbatches(np.arange(num, dtype=np.int32), 4)
    assert len(parts) == -(-num // 4)
    assert all(part.shape == (4,) for part in parts)
    everything = np.concatenate([*parts, []])
    assert sorted(everything[everything >= 0]) == list(range(num))


def test_padding_cannot_be_taken_for_the_last_record_unawares():
    """JAX refuses the masked array whole: its two parts are given by name."""
    draw = batches(0, num_records=N, sampling_prob=Q, microbatch_size=9)
    expected = microbatches(poisson(0, 5), 9)
    for batch, indices in zip(draw(5), expected, strict=True):
        np.testing.assert_array_equal(batch.data, indices)
        np.testing.assert_array_equal(batch.mask, indices < 0)
    for lookup in (jnp.arange(N).__getitem__, jax.jit(lambda i: jnp.arange(N)[i])):
        with pytest.raises(ValueError, match="masked arrays are not supported"):
            lookup(batch)


def words(key):
    return jax.random.key_data(key).tobytes()


def test_streams_are_distinct_and_repeatable():
    seeds = (0, 1, 2**32, 2**127 + 3)
    keys = {words(stream_key(seed, name)) for seed in seeds for name in STREAMS}
    assert len(keys) == len(seeds) * len(STREAMS)
    assert words(stream_key(3, "init")) == words(stream_key(3, "init"))


@pytest.mark.parametrize("draw", [stream_key, generator])
def test_streams_that_nobody_knows_are_refused(draw):
    with pytest.raises(
        UserError, match=r"the stream is 'nois': it must be one of init"
    ):
        draw(0, "nois")


@pytest.mark.proves("sampling.record_keys", 1)
def test_the_key_of_a_record_follows_the_record():
    key = stream_key(0, "augmentation")
    batch = np.array([7, 3, -1, 9], np.int32)
    keys = record_keys(key, np.int32(4), batch)
    again = record_keys(key, np.int32(4), batch[::-1].copy())
    for i in range(4):
        assert words(keys[i]) == words(again[3 - i])
    assert len({words(k) for k in keys}) == 4
    square = record_keys(key, np.int32(4), batch.reshape(2, 2))
    assert words(square.reshape(4)) == words(keys)
    assert words(record_keys(key, np.int32(5), batch)[0]) != words(keys[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_records": 0, "sampling_prob": 0.1}, "num_records is 0"),
        ({"num_records": 5, "sampling_prob": 1.1}, "sampling_prob is 1.1"),
        ({"num_records": 5, "sampling_prob": float("nan")}, "sampling_prob is nan"),
        ({"num_records": 2**31, "sampling_prob": 0.1}, "num_records is 2147483648"),
        ({"num_records": 5, "sampling_prob": 0.1, "step": -1}, "step is -1: it must"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        poisson_batch(**{"seed": 0, "step": 0, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": 2}, "bands is 2: it must be 1 for random allocation"),
        ({"sampling_prob": 0.3}, "sampling_prob is 0.3: it must be one over a whole"),
        ({"sampling_prob": 0}, "sampling_prob is 0: it must be one over a whole"),
    ],
)
def test_allocation_is_of_whole_epochs(options, message):
    given = {"num_records": 9, "sampling_prob": 0.5, "microbatch_size": 2}
    with pytest.raises(UserError, match=message):
        batches(0, allocated=True, **{**given, **options})


def test_a_microbatch_has_a_record():
    with pytest.raises(UserError, match="microbatch_size is 0: it must be at least 1"):
        microbatches(np.arange(3), 0)
