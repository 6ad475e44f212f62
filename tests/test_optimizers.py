"""Steps that know of the noise: each against a plain loop, and what it promises."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpmix_jax as dpm
from dpmix_jax import UserError, data, training
from dpmix_jax.optimizers import adam_bc, kalman, low_pass
from dpmix_jax.run import build
from dpmix_jax.run.checkpoint import Checkpoints
from dpmix_jax.run.config import OptimizerConfig
from dpmix_jax.run.workdir import Workdir
from tests import runs, toy

STDDEV = 0.3
MEMBERS = {
    "adam_bc": adam_bc(0.1, noise_stddev=STDDEV, b2=0.9, floor=0.01),
    "low_pass": low_pass(a=(-0.9, 0.2), b=(0.2, 0.1, 0.05)),
    "low_pass_without_past": low_pass(a=(), b=(0.7,)),
    "kalman": kalman(optax.sgd(0.1, momentum=0.5), kappa=0.3),
    "kalman_of_low_pass": kalman(
        optax.chain(low_pass((-0.5,), (0.5,)), optax.sgd(0.1)), kappa=0.3
    ),
}
PARAMS = {"kernel": jnp.array([[1.0, -2.0, 0.5]]), "bias": jnp.array(3.0)}


def gradients(num, seed=0):
    """Returns private means for `PARAMS`, one after another."""
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: np.asarray(rng.normal(size=p.shape), np.float32), PARAMS)
        for _ in range(num)
    ]


def steps(transform, means, state=None, params=PARAMS):
    """Applies one mean after another; returns parameters after each, and the state."""
    state, trail = transform.init(params) if state is None else state, []
    for mean in means:
        updates, state = transform.update(mean, state, params)
        params = optax.apply_updates(params, updates)
        trail.append(params)
    return trail, state


def assert_close(found, expected, **tolerances):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, **tolerances), found, expected
    )


# --- Of every member --------------------------------------------------------------


@pytest.mark.parametrize("transform", MEMBERS.values(), ids=MEMBERS)
class TestContract:
    @pytest.mark.sampled("adam_bc", "kalman")
    def test_jit_equals_eager(self, transform):
        compiled = optax.GradientTransformation(
            jax.jit(transform.init), jax.jit(transform.update)
        )
        means = gradients(5)
        found = steps(compiled, means)
        assert_close(found, steps(transform, means), rtol=1e-5, atol=1e-6)

    def test_goes_on_from_a_checkpoint(self, transform, tmp_path):
        means, first = gradients(7), training.init_state(PARAMS, transform)
        trail, last = steps(transform, means)
        params, state = steps(transform, means[:3])
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(first._replace(params=params[-1], opt_state=state))
        saved = checkpoints.restore(first)
        again, end = steps(transform, means[3:], saved.opt_state, saved.params)
        jax.tree.map(np.testing.assert_array_equal, (again, end), (trail[3:], last))

    def test_zeros_are_no_step_and_types_stay(self, transform):
        zeros = optax.tree.zeros_like(PARAMS)
        trail, state = steps(transform, [zeros] * 3)
        jax.tree.map(np.testing.assert_array_equal, trail, [PARAMS] * 3)
        before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        first = transform.init(PARAMS)
        assert before == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), first)

    def test_half_precision_stays(self, transform):
        half = optax.tree.cast(PARAMS, jnp.bfloat16)
        updates, _ = transform.update(half, transform.init(half), half)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


# --- adam_bc ----------------------------------------------------------------------


def test_adam_bc_is_its_loop():
    b1, b2, floor, rate = 0.8, 0.9, 0.02, 0.1
    means = gradients(20)
    transform = adam_bc(rate, noise_stddev=0.7, b1=b1, b2=b2, floor=floor)
    trail, _ = steps(transform, means)
    for name in PARAMS:
        x, m, v, at_floor = np.array(PARAMS[name], np.float64), 0.0, 0.0, 0
        for t, (mean, found) in enumerate(zip(means, trail, strict=True), 1):
            g = np.array(mean[name], np.float64)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            second = v / (1 - b2**t) - 0.7**2
            at_floor += np.sum(second < floor)
            x -= rate * m / (1 - b1**t) / np.sqrt(np.maximum(second, floor))
            np.testing.assert_allclose(found[name], x, rtol=1e-5)
        assert 0 < at_floor < 20 * x.size  # both sides of the maximum


def test_without_noise_adam_bc_is_adam():
    means = gradients(10)
    ours = adam_bc(0.1, noise_stddev=0.0, b1=0.9, b2=0.99, floor=1e-16)
    adam = optax.adam(0.1, b1=0.9, b2=0.99, eps=0.0)
    with jax.numpy_dtype_promotion("standard"):  # as optax needs it
        expected, _ = steps(adam, means)
    assert_close(steps(ours, means)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_pure_noise_leaves_no_second_moment(factor):
    """With b1 = 0 a step of rate 1 is g / sqrt(v): v can be read off it."""
    size, stddev = 2000, 0.05
    rng = np.random.default_rng(1)
    transform = adam_bc(1.0, noise_stddev=factor * stddev, b1=0.0, b2=0.99, floor=1e-12)
    state, update = transform.init(jnp.zeros(size)), jax.jit(transform.update)
    for _ in range(500):
        noise = jnp.asarray(stddev * rng.normal(size=size), jnp.float32)
        updates, state = update(noise, state)
    corrected = np.square(np.asarray(noise / updates, np.float64))
    above = corrected > 2e-12
    # Half of the coordinates are above the floor if the correction is right.
    share = {0.8: (0.95, 1.0), 1.0: (0.4, 0.6), 1.25: (0.0, 0.05)}[factor]
    assert share[0] <= above.mean() <= share[1]
    second = optax.tree.bias_correction(
        optax.tree.get(state, "nu"), 0.99, jnp.float32(500)
    )
    mean = (np.mean(np.asarray(second)) - (factor * stddev) ** 2) / stddev**2
    assert (abs(mean) < 0.02) == (factor == 1.0)


# --- low_pass ---------------------------------------------------------------------


def filtered(transform, means):
    """Returns what comes out for each mean, along a first axis."""
    means = jax.tree.map(lambda *leaves: np.stack(leaves), *means)

    def step(state, mean):
        return transform.update(mean, state)[::-1]

    return jax.lax.scan(step, transform.init(PARAMS), means)[1]


def test_low_pass_is_its_loop():
    a, b, means = (-0.9, 0.2), (0.2, 0.1, 0.05), gradients(12)
    found = filtered(low_pass(a, b), means)
    for name in PARAMS:
        g, m, c = [np.array(mean[name], np.float64) for mean in means], [], []
        for t in range(len(means)):
            past = range(1, min(len(a), t) + 1)
            last = range(min(len(b) - 1, t) + 1)
            m.append(
                sum(b[r] * g[t - r] for r in last)
                - sum(a[r - 1] * m[t - r] for r in past)
            )
            c.append(sum(b[r] for r in last) - sum(a[r - 1] * c[t - r] for r in past))
            expected = m[t] / c[t]
            np.testing.assert_allclose(found[name][t], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("a", "b"), [((), (3.0,)), ((-0.9,), (0.05, 0.05)), ((-1.98, 0.985), (1e-3, 2e-3))]
)
def test_a_constant_passes_from_the_first_update_on(a, b):
    for found in jax.tree.leaves(filtered(low_pass(a, b), [PARAMS] * 30)):
        np.testing.assert_allclose(found, [found[0]] * 30, rtol=1e-4)


def test_of_first_order_is_the_average_of_optax():
    means = gradients(8)
    found = filtered(low_pass((-0.7,), (0.3,)), means)
    with jax.numpy_dtype_promotion("standard"):  # as optax needs it
        expected = filtered(optax.ema(0.7), means)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_both_halves_take_out_what_alternates_and_leave_less_noise():
    gain = 0.2
    whole, halves = (low_pass((gain - 1,), b) for b in ((gain,), (gain / 2, gain / 2)))
    for transform, expected in ((whole, gain / (2 - gain)), (halves, gain / 2)):
        noise = filtered(transform, gradients(4000))["kernel"][50:]
        np.testing.assert_allclose(np.var(noise), expected, rtol=0.1)
    alternating = [
        jax.tree.map(lambda p, i=i: (-1.0) ** i * p, PARAMS) for i in range(99)
    ]
    for found in jax.tree.leaves(filtered(halves, alternating)):
        np.testing.assert_allclose(found[-1], np.zeros_like(found[-1]), atol=1e-6)


# --- kalman -----------------------------------------------------------------------

CURVATURE = np.array([[2.0, 0.3], [0.3, 0.5]])
MINIMUM = np.array([1.0, -1.0])
START = np.array([3.0, 2.0])


def on_quadratic(transform, noise):
    """Returns the points where gradients were taken, and the iterates of `kalman`."""
    params = jnp.asarray(START, jnp.float32)
    state, points, weights = transform.init(params), [], []
    for drawn in noise:
        points.append(params)
        mean = jnp.asarray(CURVATURE @ (np.asarray(params) - MINIMUM) + drawn)
        updates, state = transform.update(mean.astype(jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        weights.append(optax.tree.get((0, state), "KalmanState").weights)
    return np.array(points), np.array(weights)


def test_kalman_is_the_loop_that_extrapolates():
    """It keeps x_t, and asks for the gradient at the extrapolated point."""
    kappa, rate, momentum = 0.3, 0.2, 0.5
    noise = np.random.default_rng(0).normal(size=(25, 2))
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate, momentum))
    points, weights = on_quadratic(kalman(inner, kappa), noise)
    x, before, estimate, trace = START, START, None, 0.0
    for t, drawn in enumerate(noise):
        ahead = x + (1 - kappa) / kappa * (x - before)
        np.testing.assert_allclose(points[t], ahead, rtol=1e-4, atol=1e-5)
        g = CURVATURE @ (ahead - MINIMUM) + drawn
        estimate = g if estimate is None else (1 - kappa) * estimate + kappa * g
        trace = momentum * trace + estimate + 0.1 * x  # not of the point ahead
        before, x = x, x - rate * trace
        np.testing.assert_allclose(weights[t], x, rtol=1e-4, atol=1e-5)


def test_without_noise_kalman_follows_the_gradient_of_a_quadratic():
    """The estimate is that at x_t, not at the past: iterates are those of `inner`."""
    _, weights = on_quadratic(kalman(optax.sgd(0.2), 0.3), np.zeros((15, 2)))
    x = START
    for found in weights:
        x = x - 0.2 * CURVATURE @ (x - MINIMUM)
        np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)


def test_a_gain_of_one_is_the_inner_optimizer():
    means = gradients(5)
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    found, _ = steps(kalman(inner, 1.0), means)
    assert_close(found, steps(inner, means)[0], rtol=1e-5)


# --- Mistakes, configs and runs ---------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adam_bc(1.0, noise_stddev=-1.0), "noise_stddev is -1.0: it must be"),
        (lambda: adam_bc(1.0, noise_stddev=1.0, floor=0.0), "floor is 0.0: it must be"),
        (lambda: adam_bc(1.0, noise_stddev=1.0, b2=1.0), r"b2 is 1.0: it must be in"),
        (lambda: low_pass((-1.0,), (1.0,)), r"a is \(-1.0,\): it must be of a stable"),
        (lambda: low_pass((-2.5, 1.0), (1.0,)), r"a is \(-2.5, 1.0\): it must be of a"),
        (lambda: low_pass((), (0.0, 1.0)), r"b is \(0.0, 1.0\): it must be numbers"),
        (lambda: low_pass((), ()), r"b is \(\): it must be numbers of which"),
        *(
            (
                lambda b=b: low_pass((), b),
                f"b is .*{b[-1]}.: it must be of a filter that",
            )
            for b in ((1.0, -1.0), (0.1, 0.2, -0.3), (1.0, -1.0, 1.0))
        ),
        (lambda: kalman(optax.sgd(1.0), 0.0), r"kappa is 0.0: it must be in \(0, 1\]"),
        (
            lambda: MEMBERS["kalman"].update(PARAMS, MEMBERS["kalman"].init(PARAMS)),
            "params is None: it must be the point of this gradient",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(UserError, match=f"^{message}"):
        make()


def same_steps(found, expected):
    """Whether two transforms have states of one structure, and the same steps."""
    first, second = (steps(each, gradients(4)) for each in (found, expected))
    alike = jax.tree.structure(first) == jax.tree.structure(second)
    return alike and jax.tree.all(jax.tree.map(np.array_equal, first, second))


def config(**settings):
    return OptimizerConfig(learning_rate=0.5, **settings).build(noise_stddev=STDDEV)


def test_what_a_config_builds():
    decayed = optax.add_decayed_weights(0.1)
    assert same_steps(config(), optax.sgd(0.5))
    momentum = {"momentum": 0.9, "weight_decay": 0.1}
    sgd = optax.chain(decayed, optax.sgd(0.5, 0.9))
    assert same_steps(config(**momentum), sgd)
    smooth = low_pass((-0.75,), (0.125, 0.125))
    filters = {"filter_gain": 0.25, **momentum}
    assert same_steps(config(filter="low_pass", **filters), optax.chain(smooth, sgd))
    assert same_steps(config(filter="kalman", **filters), kalman(sgd, 0.25))
    adam = {"second_moment_decay": 0.99, "floor": 0.01, **momentum}
    expected = adam_bc(0.5, noise_stddev=STDDEV, b1=0.9, b2=0.99, floor=0.01)
    assert same_steps(config(name="adam_bc", **adam), optax.chain(decayed, expected))
    assert not same_steps(config(name="adam_bc", **momentum), config(**momentum))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, "optimizer.name is 'adam': it must be one of sgd, adam_bc"),
        ({"filter": "x"}, "optimizer.filter is 'x': it must be one of none, low_pass,"),
        ({"filter_gain": 0.0}, r"optimizer.filter_gain is 0.0: it must be in \(0, 1\]"),
        ({"floor": 0.0}, "optimizer.floor is 0.0: it must be positive"),
        ({"second_moment_decay": 1.0}, "optimizer.second_moment_decay is 1.0: it must"),
        (
            {"name": "adam_bc", "filter": "kalman"},
            "optimizer.filter is 'kalman': it must be 'none' for optimizer.name 'adam",
        ),
    ],
)
def test_a_config_refuses(settings, message):
    with pytest.raises(UserError, match=f"^{message}"):
        OptimizerConfig(learning_rate=1.0, **settings)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "changes",
    [
        {"privacy__neighboring_relation": "replace_one", "privacy__l2_clip_norm": 0.3},
        {"method__name": "microbatch_mixup", "method__k_self": 0, "method__k_base": 1},
    ],
    ids=["replace_one", "groups"],
)
def test_a_run_tells_its_optimizer_how_much_noise_there_is(changes, monkeypatch):
    """As much as moves the weights where the sum is zero and the step is SGD of 1."""
    told = []

    def record(self, noise_stddev):
        told.append(noise_stddev)
        return optax.sgd(1.0)

    monkeypatch.setattr(OptimizerConfig, "build", record)
    values = runs.config(**changes)
    train = data.load(values.data).train
    mechanism = dpm.Mechanism(
        sampling_prob=0.1,
        num_updates=12,
        noise_multiplier=3.0,
        neighboring_relation=values.privacy.relation,
    )
    model = build.classifier(values, train)
    parts = build.build(values, model, model.shapes, train, mechanism=mechanism, seed=0)
    nothing = optax.tree.zeros_like(parts.state.params)
    after = parts.apply_update(parts.state, nothing)
    moved = toy.flat(after.params) - toy.flat(parts.state.params)
    assert np.std(moved) == pytest.approx(told[0], rel=0.05)


RUNS = {
    "kalman": {"filter": "kalman", "filter_gain": 0.5},
    "low_pass": {"filter": "low_pass", "filter_gain": 0.3},
    "adam_bc": {"name": "adam_bc", "momentum": 0.9, "learning_rate": 1e-3},
}


@pytest.mark.sampled
@pytest.mark.parametrize(
    "name",
    [
        "kalman",
        pytest.param("low_pass", marks=pytest.mark.slow),
        pytest.param("adam_bc", marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_ends_with_the_same_bits(name, tmp_path, monkeypatch):
    changes = {f"optimizer__{key}": value for key, value in RUNS[name].items()}
    changes |= {"privacy__num_updates": 4, "method__name": "dp_sgd"}
    changes |= {"method__k_base": 0, "method__k_self": 0}
    changes |= {"privacy__expected_batch_size": 1437}  # all: quick to account for
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert runs.run(whole, **changes).status == 0
    said = Workdir.add_metrics

    def stop_after_two(self, line):
        said(self, line)
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "add_metrics", stop_after_two)
        assert runs.run(halves, **changes).status == 128 + signal.SIGTERM
    assert "going on after update 2" in runs.run(halves, **changes).err
    assert runs.outcome(halves) == runs.outcome(whole)
