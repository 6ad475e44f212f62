"""One private update as pure functions, and the loop over it.

Sums on several devices and processes: `test_neighbours.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpmix_jax import (
    AugmentationConfig,
    Mechanism,
    augmentation_set,
    clipped_gradient,
    devices,
    noise_key,
    poisson_batch,
    privatizer,
    record_keys,
    sampling,
    stream_key,
    training,
)
from tests import toy

RECORD_SET = augmentation_set(toy.method("self_aug"), AugmentationConfig(max_shift=1))
GRADIENT = clipped_gradient(toy.loss_fn, l2_clip_norm=0.3)
KEY = stream_key(0, "augmentation")
DATA = toy.records(40)
ARRAYS = (DATA.images, DATA.labels)
MESH = devices.make_mesh()


@pytest.fixture(scope="module")
def accumulate():
    sets = training.make_sets(
        RECORD_SET, normalize=DATA.normalize, num_classes=toy.NUM_CLASSES
    )
    clipped_sum = training.make_clipped_sum(sets, GRADIENT, l2_clip_norm=0.3)
    return training.make_accumulate(clipped_sum, MESH)


@functools.cache
def optimizer_and_update(noise_multiplier=1.0):
    mechanism = Mechanism(
        sampling_prob=0.2, num_updates=9, noise_multiplier=noise_multiplier
    )
    noise = privatizer(GRADIENT, mechanism, expected_batch_size=8, key=noise_key(0))
    optimizer = optax.chain(noise, optax.sgd(0.5))
    return optimizer, training.make_update(optimizer, ema_decay=0.9)


def train(
    accumulate,
    microbatch_size,
    *,
    num_updates=4,
    q=0.2,
    seed=3,
    noise_multiplier=1.0,
    state=None,
    on_host=False,
    **options,
):
    """Returns the iterator over (state, nonprivate sums)."""
    optimizer, apply_update = optimizer_and_update(noise_multiplier)
    indices = sampling.batches(
        seed, num_records=len(DATA), sampling_prob=q, microbatch_size=microbatch_size
    )
    host_records = ARRAYS if on_host else ()
    return training.train(
        state or training.init_state(toy.init_params(), optimizer),
        accumulate,
        apply_update,
        training.put_inputs(KEY, MESH, records=() if on_host else ARRAYS),
        mesh=MESH,
        batches=lambda step: [
            training.put_batch(part, MESH, host_records) for part in indices(step)
        ],
        num_updates=num_updates,
        **options,
    )


def states(*args, **options):
    return [state for state, _ in train(*args, **options)]


def test_updates_equal_their_definition(accumulate):
    """Sum of clipped set averages of the drawn records, over B, times the rate."""
    images = DATA.normalize(jnp.asarray(DATA.images))

    @jax.jit
    def of_one(params, key, image, label):
        label = jax.nn.one_hot(label, toy.NUM_CLASSES)
        return jax.value_and_grad(toy.loss_fn)(params, *RECORD_SET(key, image, label))

    params, average = toy.init_params(), toy.flat(toy.init_params())
    updates = train(accumulate, 8, num_updates=2, seed=4, noise_multiplier=1e-9)
    for step, (state, sums) in enumerate(updates):
        batch = poisson_batch(4, step, num_records=len(DATA), sampling_prob=0.2)
        assert len(batch) != 8  # the expected size, by which the sum is divided
        keys = record_keys(KEY, jnp.int32(step), batch)
        total, losses, norms = 0.0, [], []
        for key, index in zip(keys, batch, strict=True):
            loss, gradient = of_one(params, key, images[index], DATA.labels[index])
            losses.append(float(loss))
            norms.append(np.linalg.norm(toy.flat(gradient)))
            total += toy.flat(gradient) * min(1.0, 0.3 / norms[-1])
        expected = toy.flat(params) - 0.5 * total / 8
        np.testing.assert_allclose(toy.flat(state.params), expected, atol=1e-6)
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * expected
        np.testing.assert_allclose(toy.flat(state.ema_params), average, atol=1e-6)
        assert sums["records"] == len(batch) > 0
        assert sums["loss"] == pytest.approx(sum(losses), rel=1e-5)
        assert sums["clipped"] == float(np.sum(np.array(norms) > 0.3))
        assert 0 < sums["clipped"] < len(batch)
        params = state.params
    assert state.step == 2


def loss_by_rows(params, images, labels, scale):
    """Each class has a row of parameters for itself; the last one is everybody's."""
    features = images.reshape(len(images), 1, -1)
    scores = jnp.tanh(scale * (features * params[None]).sum(axis=2))
    return ((labels * scores).sum(axis=1) + scores[:, -1]).mean()


@pytest.mark.proves("training.make_sets", 1)
@pytest.mark.proves("training.make_clipped_sum", 1)
def test_a_term_is_of_its_record_alone():
    """Bit for bit: each record has a class, and so a row of the sum, for itself."""
    num, changed = 6, 2
    clipped_sum = jax.jit(
        training.make_clipped_sum(
            training.make_sets(
                RECORD_SET, normalize=lambda images: images, num_classes=num + 1
            ),
            clipped_gradient(loss_by_rows, l2_clip_norm=0.1),
            l2_clip_norm=0.1,
        )
    )
    rng = np.random.default_rng(0)
    images = rng.normal(size=(num, 6, 6, 1)).astype(np.float32)
    params = jnp.asarray(rng.normal(size=(num + 1, 36)), jnp.float32)
    each, others = np.arange(num), np.arange(num) != changed

    def sums(images=images, labels=each, indices=each, **changes):
        given = {"step": 3, "seed": 0, "scale": 0.1, "params": params} | changes
        inputs = training.put_inputs(
            stream_key(given["seed"], "augmentation"),
            MESH,
            records=(images, labels),
            constants=(np.float32(given["scale"]),),
        )
        batch = training.put_batch(indices, MESH)
        sums = clipped_sum(given["params"], jnp.int32(given["step"]), batch, inputs)
        return np.asarray(sums.gradients)

    def terms(*args, **changes):
        return sums(*args, **changes)[:num]

    base = terms()
    assert base.any(axis=1).all()
    # Nothing of the others: neither pixels, nor label, nor presence, nor places.
    for value in (0.0, np.nan, np.inf, 1e30):
        spoiled = np.where(others[:, None, None, None], images, np.float32(value))
        np.testing.assert_array_equal(terms(spoiled)[others], base[others])
    labels = np.where(others, each, num)
    np.testing.assert_array_equal(terms(labels=labels)[others], base[others])
    for place in each:
        alone = np.where(each == place, changed, -1)
        expected = np.where(others[:, None], 0, base)
        np.testing.assert_array_equal(terms(indices=alone), expected)
    np.testing.assert_array_equal(terms(indices=each[::-1]), base)
    assert not sums(indices=np.full(num, -1)).any()
    # What it does depend on: its index, and the others that are named.
    same = np.broadcast_to(images[:1], images.shape), 0 * params + params[:1]
    assert len(np.unique(terms(same[0], params=same[1]), axis=0)) > 1
    for change in ({"step": 4}, {"seed": 1}, {"scale": 0.2}, {"params": 2 * params}):
        assert (terms(**change) != base).any(axis=1).all()


@pytest.mark.sampled("40")
@pytest.mark.proves("training.make_accumulate", 2)
@pytest.mark.parametrize("microbatch_size", [1, 40])
def test_microbatch_size_changes_rounding_only(accumulate, microbatch_size):
    reference = states(accumulate, 8)[-1]
    other = states(accumulate, microbatch_size)[-1]
    np.testing.assert_allclose(
        toy.flat(other.params), toy.flat(reference.params), atol=1e-6
    )


@pytest.mark.proves("training.make_accumulate", 2)
def test_records_from_the_host_give_the_same_bits(accumulate):
    """Across empty batches, too."""
    for q in (0.2, 0.01):
        ours, theirs = (states(accumulate, 8, q=q, on_host=h) for h in (False, True))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(toy.flat(a.params), toy.flat(b.params))


@pytest.mark.proves("training.make_accumulate", 3)
def test_another_default_generator_makes_the_same_sets(accumulate):
    *_, (expected, _) = train(accumulate, 8, num_updates=2)
    with jax.default_prng_impl("rbg"):
        jax.clear_caches()
        *_, (found, _) = train(accumulate, 8, num_updates=2)
    np.testing.assert_array_equal(toy.flat(found.params), toy.flat(expected.params))


def test_nothing_compiles_after_the_first_updates(accumulate):
    """Whatever sizes are drawn, empty batches among them."""
    updates, sizes = train(accumulate, 2, num_updates=40, q=0.06, seed=0), []
    next(updates)
    next(updates)
    with toy.compilations() as compiled:
        for _, sums in updates:
            sizes.append(int(sums["records"]))
        assert compiled == []
        jax.jit(lambda x: x * 3)(jnp.ones(7))
        assert compiled  # it does hear
    assert 0 in sizes
    assert len(set(sizes)) >= 4


def test_an_empty_batch_takes_its_noisy_update(accumulate):
    before = toy.flat(toy.init_params())
    first, second = states(accumulate, 8, num_updates=2, q=0.0)
    steps = [
        toy.flat(first.params) - before,
        toy.flat(second.params) - toy.flat(first.params),
    ]
    for step in steps:  # pure noise: rate * sigma * C / B
        assert step.std() == pytest.approx(0.5 * 1.0 * 0.3 / 8, rel=0.5)
    assert abs(np.corrcoef(*steps)[0, 1]) < 0.5
    assert not np.array_equal(*steps)


def test_going_on_from_a_state_is_bit_identical(accumulate):
    whole = states(accumulate, 8)
    *_, last = states(accumulate, 8, state=jax.tree.map(jnp.copy, whole[1]))
    for name in ("params", "ema_params", "step"):
        np.testing.assert_array_equal(
            toy.flat(getattr(last, name)), toy.flat(getattr(whole[-1], name))
        )


def test_stopping_drops_the_update_under_way(accumulate):
    whole = states(accumulate, 2, num_updates=3)
    sizes = [
        len(poisson_batch(3, step, num_records=len(DATA), sampling_prob=0.2))
        for step in range(2)
    ]
    first, second = (-(-size // 2) for size in sizes)
    assert second > 1
    calls = iter([False] * (first + second - 1) + [True] * 99)
    (stopped,) = states(accumulate, 2, num_updates=3, stop=lambda: next(calls))
    np.testing.assert_array_equal(toy.flat(stopped.params), toy.flat(whole[0].params))


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


def test_sums_are_float32_for_any_params():
    sums = training.init_sums({"w": jnp.ones(3, jnp.bfloat16)}, MESH)
    assert sums.gradients["w"].dtype == jnp.float32
