import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpmix_jax import (
    AugmentationConfig,
    Mechanism,
    MethodConfig,
    UserError,
    augmentation_set,
    clipped_gradient,
    poisson_batch,
    privatizer,
    record_keys,
    sampling,
    stream_key,
    training,
)
from tests import toy

METHOD = MethodConfig(name="dp_mix_self", k_base=2, k_self=2)
RECORD_SET = augmentation_set(METHOD, AugmentationConfig(max_shift=1))
GRADIENT = clipped_gradient(toy.loss_fn, l2_clip_norm=0.3)
KEY = stream_key(0, "augmentation")
DATA = toy.records(40)


@pytest.fixture(scope="module")
def accumulate():
    return training.Accumulate(
        GRADIENT, RECORD_SET, DATA, training.make_mesh(), key=KEY, l2_clip_norm=0.3
    )


def make_update(noise_multiplier=1.0, ema_decay=0.9):
    mechanism = Mechanism(
        sampling_prob=0.2, num_updates=9, noise_multiplier=noise_multiplier
    )
    optimizer = optax.chain(
        privatizer(
            GRADIENT, mechanism, expected_batch_size=8, key=stream_key(0, "noise")
        ),
        optax.sgd(0.5),
    )
    return optimizer, training.make_update(optimizer, ema_decay=ema_decay)


def draw(microbatch_size, q=0.2, seed=3):
    return sampling.batches(
        seed, num_records=len(DATA), sampling_prob=q, microbatch_size=microbatch_size
    )


def train(accumulate, microbatch_size, num_updates=4, q=0.2, **options):
    optimizer, update = make_update()
    states = training.train(
        training.init_state(toy.init_params(), optimizer),
        accumulate,
        update,
        mesh=training.make_mesh(),
        draw=draw(microbatch_size, q),
        num_updates=num_updates,
        **options,
    )
    return [state for state, _ in states]


def test_one_update_equals_its_definition(accumulate):
    """Sum of clipped set averages of the drawn records, over B, times the rate."""
    optimizer, update = make_update(noise_multiplier=1e-9)
    params = toy.init_params()
    batch = poisson_batch(3, 0, num_records=len(DATA), sampling_prob=0.2)
    total = np.zeros_like(toy.flat(params))
    keys = record_keys(KEY, jnp.int32(0), batch)
    images = DATA.normalize(jnp.asarray(DATA.images))
    for key, index in zip(keys, batch, strict=True):
        label = jax.nn.one_hot(DATA.labels[index], toy.NUM_CLASSES)
        members = RECORD_SET(key, images[index], label)
        gradient = toy.flat(jax.grad(toy.loss_fn)(params, *members))
        total += gradient * min(1.0, 0.3 / np.linalg.norm(gradient))
    (state, sums), *_ = training.train(
        training.init_state(params, optimizer),
        accumulate,
        update,
        mesh=training.make_mesh(),
        draw=draw(4),
        num_updates=1,
    )
    expected = toy.flat(params) - 0.5 * total / 8
    np.testing.assert_allclose(toy.flat(state.params), expected, atol=1e-6)
    assert sums["records"] == len(batch) > 0


@pytest.mark.proves("training.Accumulate", 2)
@pytest.mark.parametrize("microbatch_size", [1, 3, 40])
def test_microbatch_size_changes_rounding_only(accumulate, microbatch_size):
    reference = train(accumulate, 8)[-1]
    other = train(accumulate, microbatch_size)[-1]
    np.testing.assert_allclose(
        toy.flat(other.params), toy.flat(reference.params), atol=1e-6
    )


@pytest.mark.proves("training.Accumulate", 3)
def test_nothing_compiles_after_the_first_updates(accumulate):
    """Whatever sizes are drawn, empty batches among them."""
    compiled, sizes = [], []
    optimizer, update = make_update()
    updates = training.train(
        training.init_state(toy.init_params(), optimizer),
        accumulate,
        update,
        mesh=training.make_mesh(),
        draw=draw(2, 0.06, seed=0),
        num_updates=40,
    )
    next(updates)
    next(updates)

    def listen(event, duration, **kwargs):
        del duration, kwargs
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _, sums in updates:
            sizes.append(int(sums["records"]))
        assert compiled == []
        jax.jit(lambda x: x * 3)(jnp.ones(7))
        assert compiled  # the listener does hear
    finally:
        jax.monitoring.clear_event_listeners()
    assert 0 in sizes
    assert len(set(sizes)) >= 4


def test_an_empty_batch_takes_its_noisy_update(accumulate):
    before = toy.flat(toy.init_params())
    first, second = train(accumulate, 4, num_updates=2, q=0.0)
    steps = [
        toy.flat(first.params) - before,
        toy.flat(second.params) - toy.flat(first.params),
    ]
    for step in steps:  # pure noise: rate * sigma * C / B
        assert step.std() == pytest.approx(0.5 * 1.0 * 0.3 / 8, rel=0.5)
    assert abs(np.corrcoef(*steps)[0, 1]) < 0.5
    assert not np.array_equal(*steps)


def test_going_on_from_a_state_is_bit_identical(accumulate):
    whole = train(accumulate, 8, num_updates=5)
    _, update = make_update()
    again = training.train(
        jax.tree.map(jnp.copy, whole[1]),
        accumulate,
        update,
        mesh=training.make_mesh(),
        draw=draw(8),
        num_updates=5,
    )
    last = [state for state, _ in again][-1]
    for name in ("params", "ema_params", "step"):
        np.testing.assert_array_equal(
            toy.flat(getattr(last, name)), toy.flat(getattr(whole[-1], name))
        )


def test_stopping_drops_the_update_under_way(accumulate):
    whole = train(accumulate, 2, num_updates=3)
    parts = [
        len(poisson_batch(3, step, num_records=len(DATA), sampling_prob=0.2) + 1) // 2
        for step in range(3)
    ]
    assert parts[1] > 1
    calls = iter([False] * (parts[0] + parts[1] - 1) + [True] * 99)
    stopped = train(accumulate, 2, num_updates=3, stop=lambda: next(calls))
    assert 1 <= len(stopped) < 3
    for state, same in zip(stopped, whole, strict=False):
        np.testing.assert_array_equal(toy.flat(state.params), toy.flat(same.params))


def test_ema_warms_up_as_published():
    """min(decay, (1 + t) / (10 + t)), De et al. (2022)."""
    ema = {"w": jnp.zeros(())}
    expected = 0.0
    for step, new in enumerate([1.0, 4.0, -2.0, 8.0]):
        decay = min(0.2, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * new
        ema = training.ema_update(
            ema, {"w": jnp.float32(new)}, decay=0.2, step=jnp.int32(step)
        )
        assert float(ema["w"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.proves("training.Accumulate", 2)
def test_records_from_the_host_give_the_same_bits(accumulate):
    """Read ahead from a dataset that is not on the device, across empty batches."""
    host = training.Accumulate(
        GRADIENT,
        RECORD_SET,
        DATA,
        training.make_mesh(),
        key=KEY,
        l2_clip_norm=0.3,
        on_device=False,
    )
    for q in (0.2, 0.01):
        ours, theirs = (train(a, 4, q=q) for a in (accumulate, host))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(toy.flat(a.params), toy.flat(b.params))


def test_totals_are_float32_for_any_params():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    totals = training.init_totals(params, training.make_mesh())
    assert totals.gradients["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (training.OptimizerConfig, {"learning_rate": 0.0}, "learning_rate is 0.0"),
        (
            training.OptimizerConfig,
            {"learning_rate": 1.0, "momentum": 1.0},
            r"optimizer.momentum is 1.0: it must be in \[0, 1\)",
        ),
        (
            training.OptimizerConfig,
            {"learning_rate": 1.0, "ema_decay": -0.1},
            "optimizer.ema_decay is -0.1",
        ),
    ],
)
def test_refuses(config, options, message):
    with pytest.raises(UserError, match=message):
        config(**options)
