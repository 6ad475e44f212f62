import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import NeighboringRelation

from dpmix_jax import (
    Mechanism,
    PrivacyConfig,
    UserError,
    accounting,
    calibrate,
    clipped_gradient,
    gradients,
    noise_key,
    privatizer,
)
from dpmix_jax.noise import extra_delta, next_key
from dpmix_jax.run import build, performance
from dpmix_jax.run.statement import (
    CLIPPINGS,
    RULES,
    privacy_report,
    round_up,
    statement,
)
from dpmix_jax.selection import Selection
from tests import toy

# (q, T, sigma, lower and upper bound on epsilon, RDP epsilon) at delta = 1e-5, relation
# add or remove one. Bounds: prv_accountant 0.2.0 (Gopi et al., 2021; numerical
# composition with an error bound, eps_error 0.005). RDP: opacus 1.6.0, orders 1.1, 1.2,
# ..., 10.9, 11, ..., 63, 128, 256, 512, 1024. The first twelve rows are runs of De et
# al. (2022) and DP-Mix on CIFAR-10, then Caltech256, SUN397, Pet and Fashion-MNIST
# sizes, digits, full batches and small q.
GOLDEN = [
    (4096 / 50000, 875, 9.12, 0.9949, 1.0049, 1.0937),
    (4096 / 50000, 875, 10.0, 0.8978, 0.9078, 0.9877),
    (4096 / 50000, 1125, 6.0, 1.8314, 1.8414, 1.9996),
    (4096 / 50000, 1593, 5.0, 2.7421, 2.7522, 2.9825),
    (4096 / 50000, 1687, 4.0, 3.6827, 3.6927, 3.9962),
    (4096 / 50000, 1843, 3.0, 5.5017, 5.5117, 5.9522),
    (4096 / 50000, 2600, 2.6225, 7.9947, 8.0047, 8.6212),
    (4096 / 50000, 3066, 3.0, 7.4170, 7.4270, 7.9988),
    (16384 / 50000, 906, 40.0, 0.9085, 0.9185, 0.9986),
    (16384 / 50000, 1156, 24.0, 1.8332, 1.8432, 1.9991),
    (16384 / 50000, 1765, 16.0, 3.6860, 3.6960, 3.9937),
    (16384 / 50000, 2000, 9.4, 7.4194, 7.4294, 7.9905),
    (1000 / 24485, 245, 1.0, 4.2327, 4.2427, 4.7783),
    (1000 / 24485, 245, 2.0, 1.3833, 1.3933, 1.5314),
    (1000 / 87003, 870, 0.8, 3.3996, 3.4096, 3.9808),
    (1000 / 3680, 37, 3.0, 2.4504, 2.4604, 2.6988),
    (256 / 60000, 3510, 1.0, 1.3452, 1.3552, 1.5588),
    (512 / 60000, 2344, 0.8, 3.9071, 3.9171, 4.4424),
    (256 / 1437, 100, 2.69, 2.9953, 3.0053, 3.2841),
    (719 / 1437, 100, 6.0, 3.6185, 3.6285, 3.9302),
    (1.0, 1, 4.0, 0.9213, 0.9313, 1.0126),
    (1.0, 100, 20.0, 1.9881, 1.9981, 2.1657),
    (0.001, 10000, 0.6, 2.4511, 2.4611, 3.3219),
    (0.01, 1000, 1.0, 1.8232, 1.8332, 2.1014),
]


@pytest.mark.sampled(
    "0.08192-2600-2.6225-7.9947-8.0047-8.6212", "1.0-100-20.0-1.9881-1.9981-2.1657"
)
@pytest.mark.parametrize(("q", "updates", "sigma", "low", "high", "rdp"), GOLDEN)
def test_epsilon_is_that_of_independent_accountants(q, updates, sigma, low, high, rdp):
    mechanism = Mechanism(sampling_prob=q, num_updates=updates, noise_multiplier=sigma)
    assert low <= mechanism.epsilon(1e-5) <= high
    # dp_accounting leaves out orders that do not converge; a few bring 0.1 %.
    assert mechanism.epsilon(1e-5, accountant="rdp") == pytest.approx(rdp, rel=2e-3)


def gaussian_delta(epsilon, mu):
    """delta of a Gaussian mechanism of sensitivity mu (Balle and Wang, 2018, Thm 8)."""

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)


@pytest.mark.sampled("2.5-NeighboringRelation.REPLACE_ONE")
@pytest.mark.parametrize("relation", list(NeighboringRelation))
@pytest.mark.parametrize("noise_multiplier", [1.0, 2.5])
def test_full_batches_spend_what_one_gaussian_does(relation, noise_multiplier):
    """Noise is relative to the sensitivity of each relation, so mu is the same."""
    mechanism = Mechanism(
        sampling_prob=1.0,
        num_updates=4,
        noise_multiplier=noise_multiplier,
        neighboring_relation=relation,
    )
    mu = math.sqrt(4) / noise_multiplier
    assert gaussian_delta(mechanism.epsilon(1e-5), mu) == pytest.approx(1e-5, rel=2e-3)


@pytest.mark.sampled
@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("relation", list(NeighboringRelation))
def test_the_epsilon_so_far_is_that_of_the_first_updates(relation, bands):
    mechanism = Mechanism(
        sampling_prob=0.3,
        num_updates=10,
        noise_multiplier=2.0,
        neighboring_relation=relation,
        strategy=(1.0, 0.5, 0.375)[:bands],
    )
    assert accounting.epsilon_after(mechanism, 0, 1e-5) == 0.0
    for updates in (4, 10):
        first = dataclasses.replace(mechanism, num_updates=updates)
        found = accounting.epsilon_after(mechanism, updates, 1e-5)
        assert found == pytest.approx(first.epsilon(1e-5), rel=1e-9)


@pytest.mark.sampled(
    "1.0-0.08192-875-replace_special-9.12", "0.05-0.01-100-add_or_remove_one-None"
)
@pytest.mark.proves("accounting.calibrate", 1)
@pytest.mark.parametrize(
    ("epsilon", "q", "updates", "relation", "sigma"),
    [
        (8.0, 4096 / 50000, 2600, "add_or_remove_one", 2.6225),
        (1.0, 4096 / 50000, 875, "replace_special", 9.12),
        (3.0, 256 / 1437, 100, "replace_one", None),
        pytest.param(
            *(50.0, 0.5, 10, "add_or_remove_one", None), marks=pytest.mark.slow
        ),
        (0.05, 0.01, 100, "add_or_remove_one", None),
        (0.1, 1e-4, 10**6, "add_or_remove_one", None),  # where RDP is below PLD
        pytest.param(
            *(2.647, 256 / 60000, 10, "replace_one", None), marks=pytest.mark.slow
        ),
    ],
)
def test_calibration_meets_the_budget_and_wastes_nothing(
    epsilon, q, updates, relation, sigma
):
    options = {
        "epsilon": epsilon,
        "delta": 1e-5,
        "sampling_prob": q,
        "num_updates": updates,
        "neighboring_relation": accounting.RELATIONS[relation],
    }
    mechanism = calibrate(**options)
    assert 0.9995 * epsilon <= mechanism.epsilon(1e-5) <= epsilon
    if sigma is not None:
        assert mechanism.noise_multiplier == pytest.approx(sigma, abs=0.003)
    assert calibrate(**options) == mechanism  # from the cache


@pytest.mark.parametrize("epsilon", [1e-6, 1e5])
def test_calibration_says_when_no_noise_will_do(epsilon):
    with pytest.raises(UserError, match=r"no noise multiplier from 0.125 to 16384"):
        calibrate(epsilon=epsilon, delta=1e-5, sampling_prob=0.05, num_updates=50)


def test_a_spoiled_cache_is_caught(monkeypatch):
    monkeypatch.setattr(accounting, "_cached", lambda *args: 0.5)
    with pytest.raises(UserError, match=r"the cached noise multiplier 0.5 spends"):
        calibrate(epsilon=0.1, delta=1e-5, sampling_prob=0.01, num_updates=10)


def test_what_another_process_would_not_find_is_not_cached():
    """As a function without a source, which joblib knows by its address in memory."""
    with pytest.raises(AssertionError):
        accounting._cached(functools.cache(math.sqrt), 2.0)


def test_without_a_writable_cache_results_are_the_same(monkeypatch):
    options = {"epsilon": 0.05, "delta": 1e-5, "sampling_prob": 0.01}
    expected = calibrate(**options, num_updates=100)
    monkeypatch.setenv("DPMIX_JAX_CACHE", "/dev/null/nowhere")
    assert calibrate(**options, num_updates=100) == expected


def test_accountants_are_quiet(caplog):
    mechanism = Mechanism(sampling_prob=0.18, num_updates=100, noise_multiplier=2.0)
    with caplog.at_level("DEBUG"):  # a warning would fail the test anyway
        mechanism.epsilon(1e-5, accountant="rdp")
    assert not caplog.records


def noise(relation, sigma, batch, steps=3, size=40_000):
    """Updates from zero sums through the privatizer, [steps, size]."""
    gradient_fn = clipped_gradient(toy.loss_fn, l2_clip_norm=0.7)
    mechanism = Mechanism(
        sampling_prob=0.1,
        num_updates=steps,
        noise_multiplier=sigma,
        neighboring_relation=relation,
    )
    add = privatizer(
        gradient_fn, mechanism, expected_batch_size=batch, key=noise_key(0)
    )
    zeros = {"a": jnp.zeros((size // 2,)), "b": jnp.zeros((size // 20, 10))}
    state, updates = add.init(zeros), []
    for _ in range(steps):
        update, state = add.update(zeros, state)
        assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {
            jnp.dtype("float32")
        }
        updates.append(toy.flat(update))
    return np.array(updates)


def is_stddev(samples, expected):
    """Two-sided, at 5 standard errors of the estimate."""
    return abs(samples.std() / expected - 1) < 5 / math.sqrt(2 * samples.size)


@pytest.mark.proves("privacy.privatizer", 1, 3)
@pytest.mark.parametrize(
    ("relation", "sensitivity"),
    [
        (NeighboringRelation.ADD_OR_REMOVE_ONE, 0.7),
        (NeighboringRelation.REPLACE_SPECIAL, 0.7),
        (NeighboringRelation.REPLACE_ONE, 1.4),
    ],
)
def test_noise_has_the_promised_scale(relation, sensitivity):
    samples = noise(relation, sigma=2.5, batch=64)
    expected = 2.5 * sensitivity / 64
    assert is_stddev(samples, expected)
    assert not is_stddev(samples / 1.5, expected)
    assert not is_stddev(samples * 1.5, expected)
    assert abs(samples.mean()) < 5 * expected / math.sqrt(samples.size)
    shape = samples.ravel()[:20_000] / expected
    assert np.mean(np.abs(shape) > 1.96) == pytest.approx(0.05, abs=0.01)


@pytest.mark.proves("privacy.privatizer", 2)
def test_noise_is_independent_between_updates_and_coordinates():
    samples = noise(NeighboringRelation.ADD_OR_REMOVE_ONE, sigma=1.0, batch=1)
    limit = 5 / math.sqrt(samples.shape[1])
    correlations = np.corrcoef(samples)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < limit
    halves = samples.reshape(3, 2, -1)
    assert abs(np.corrcoef(halves[:, 0].ravel(), halves[:, 1].ravel())[0, 1]) < limit
    assert len(np.unique(samples)) > 0.9 * samples.size


@pytest.mark.parametrize("bands", [1, 2])
def test_a_state_is_made_outside_of_compiled_programs(bands):
    """A compiled program that is kept on disk would hold the key."""
    gradient_fn = clipped_gradient(toy.loss_fn, l2_clip_norm=0.7)
    mechanism = Mechanism(
        sampling_prob=0.1,
        num_updates=4,
        noise_multiplier=1.0,
        strategy=(1.0, 0.5)[:bands],
    )
    add = privatizer(gradient_fn, mechanism, expected_batch_size=9, key=noise_key(0))
    zeros = jnp.zeros(5)
    for compiled in (jax.jit(add.init), jax.jit(lambda _: add.init(zeros))):
        with pytest.raises(UserError, match=r"init is called under jax\.jit"):
            compiled(zeros)
    state = add.init(zeros)
    with pytest.raises(UserError, match=r"update is called .* is not an argument of"):
        jax.jit(lambda total: add.update(total, state))(zeros)
    # Each of its arrays is its own, so that an update may reuse them.
    update = jax.jit(add.update, donate_argnums=1)
    assert update(jnp.zeros(5), add.init(jnp.zeros(5)))[0].shape == (5,)


@pytest.mark.proves("privacy.privatizer", 2)
def test_an_update_looks_at_no_parameter_of_any_library():
    gradient_fn = clipped_gradient(toy.loss_fn, l2_clip_norm=0.7)
    mechanism = Mechanism(sampling_prob=0.1, num_updates=1, noise_multiplier=1.0)
    add = privatizer(gradient_fn, mechanism, expected_batch_size=9, key=noise_key(0))
    zeros = jnp.zeros(5)
    state = add.init(zeros)
    expected, _ = add.update(zeros, state)
    found, _ = add.update(zeros, state, {"activation": jax.nn.relu})
    np.testing.assert_array_equal(found, expected)


def test_a_state_cannot_draw_noise_again():
    """Whoever finds the state after an update cannot subtract what was added."""
    add = add_noise(**GOOD[add_noise])
    states = [add.init(None)]
    for _ in range(3):
        states.append(add.update(jnp.zeros(4), states[-1])[1])
    keys = [tuple(state.key.tolist()) for state in states]
    assert len(set(keys)) == len(keys)
    assert keys[0] == tuple(noise_key(0).tolist())
    assert keys[1] == tuple(next_key(states[0].key).tolist())
    assert {jnp.shape(leaf) for leaf in jax.tree.leaves(states[-1])} == {(8,)}


@pytest.mark.parametrize(
    ("relation", "secret"),
    [(relation, relation != "replace_one") for relation in accounting.RELATIONS],
)
def test_the_statement_says_everything(relation, secret):
    config = PrivacyConfig(
        **GOOD[PrivacyConfig], neighboring_relation=relation, uncovered="the rate"
    )
    mechanism = Mechanism(
        sampling_prob=config.sampling_prob(1437),
        num_updates=config.num_updates,
        noise_multiplier=2.69,
        neighboring_relation=config.relation,
    )
    facts = privacy_report(
        config,
        mechanism,
        num_records=1437,
        num_parameters=10**6,
        images_per_record=8,
        secret_seed=secret,
        sensitivity=0.75,
    )
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    text = " ".join(statement(facts).split())
    for words in (
        f"({round_up(facts['epsilon_pld'])}, 1e-05)-differentially private",
        "all of the 8 image(s) that stand for it",
        relation,
        "the final weights, raw and EMA",
        "hyperparameters chosen by looking at them",
        "Chosen by looking at private records:** the rate. No epsilon covers that.",
        "clipped to C = 1;",
        "sigma = 2.69 times",
        "times the sensitivity of that sum, 0.75; T = 100 updates",
        "Poisson sampling with q = 0.178149 (expected batch 256, N = 1437)",
        "nothing is truncated",
        "dp_accounting 0.",
        "by PLD",
        "RDP",
        "Public data used:** none",
        "deleted after the last update" if secret else "train without a fixed seed",
        "computes in float32",
        "a discrete Gaussian on it",
        f"counted in delta, as at most {round_up(extra_delta(4.0, 1e8), 2)}",
    ):
        assert words in text, words
    assert max(map(len, statement(facts).splitlines())) <= 88


@pytest.mark.parametrize(
    ("rule", "per_layer", "words"),
    [
        ("clip", True, "gradients, layer by layer and then as a whole, clipped to C"),
        ("automatic", False, "divided by their norms (automatic clipping) and clipped"),
    ],
)
def test_the_statement_says_how_gradients_are_clipped(rule, per_layer, words):
    config = PrivacyConfig(
        **GOOD[PrivacyConfig], clipping_rule=rule, per_layer=per_layer
    )
    facts = privacy_report(
        config,
        Mechanism(sampling_prob=0.1, num_updates=100, noise_multiplier=2.0),
        num_records=2560,
        num_parameters=10,
        images_per_record=1,
        secret_seed=True,
        sensitivity=1.0,
    )
    assert json.loads(json.dumps(facts)) == facts
    assert words in " ".join(statement(facts).split())


def test_what_the_grid_takes_is_counted_in_delta():
    """Also where epsilon is so large that delta cannot hold it."""

    def facts(epsilon, num_parameters=10**6):
        config = PrivacyConfig(**{**GOOD[PrivacyConfig], "epsilon": epsilon})
        mechanism = Mechanism(sampling_prob=0.1, num_updates=100, noise_multiplier=2.0)
        return mechanism, privacy_report(
            config,
            mechanism,
            num_records=2560,
            num_parameters=num_parameters,
            images_per_record=1,
            secret_seed=True,
            sensitivity=1.0,
        )

    mechanism, found = facts(15.0)
    of_grid = found["delta_of_the_grid"]
    assert 1e-8 < of_grid == extra_delta(16.0, 1e8) < 1e-7
    assert found["delta"] == 1e-5
    assert found["epsilon"] == mechanism.epsilon(1e-5 - of_grid)
    assert found["epsilon"] > mechanism.epsilon(1e-5)
    mechanism, found = facts(24.0)
    assert found["epsilon"] == mechanism.epsilon(1e-5)
    assert found["delta"] == 1e-5 + extra_delta(25.0, 1e8)
    assert facts(1000.0)[1]["delta"] == 1.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.99997, "3"),
        (3.0, "3"),
        (10.004, "10.01"),
        (0.123401, "0.1235"),
        (8, "8"),
        (1e-5, "1e-05"),
    ],
)
def test_a_promise_is_never_rounded_down(value, text):
    assert round_up(value) == text
    assert float(round_up(value)) >= value


def add_noise(**options):
    gradient_fn = clipped_gradient(toy.loss_fn, l2_clip_norm=1.0)
    mechanism = Mechanism(sampling_prob=0.1, num_updates=1, noise_multiplier=1.0)
    return privatizer(gradient_fn, mechanism, **options)


def spent(delta=1e-5, accountant="pld", **options):
    return Mechanism(**options).epsilon(delta, accountant=accountant)


GOOD = {
    spent: {"sampling_prob": 0.1, "num_updates": 1, "noise_multiplier": 1.0},
    PrivacyConfig: {"epsilon": 3.0, "expected_batch_size": 256, "num_updates": 100},
    calibrate: {"epsilon": 3.0, "delta": 1e-5, "sampling_prob": 0.1, "num_updates": 15},
    add_noise: {"expected_batch_size": 5, "key": noise_key(0)},
}


@pytest.mark.parametrize(
    ("function", "key", "value", "allowed"),
    [
        (PrivacyConfig, "epsilon", 0.0, "positive and finite"),
        (PrivacyConfig, "epsilon", -1.0, "positive and finite"),
        (PrivacyConfig, "epsilon", math.nan, "positive and finite"),
        (PrivacyConfig, "delta", 0.0, "in (0, 1)"),
        (PrivacyConfig, "delta", 1.0, "in (0, 1)"),
        (PrivacyConfig, "expected_batch_size", 0, "at least 1"),
        (PrivacyConfig, "num_updates", 0, "at least 1"),
        (PrivacyConfig, "l2_clip_norm", 0.0, "in [1e-10, 1e10]"),
        (PrivacyConfig, "neighboring_relation", "x", "one of add_or_remove_one, "),
        (calibrate, "epsilon", -1.0, "positive and finite"),
        (calibrate, "delta", 1.0, "in (0, 1)"),
        (calibrate, "sampling_prob", 0.0, "in (0, 1]"),
        (calibrate, "num_updates", 15.9, "a whole number"),
        (calibrate, "num_updates", 0, "at least 1"),
        (calibrate, "bands", 2.5, "a whole number, or None"),
        (spent, "sampling_prob", 1.2, "in [0, 1]"),
        (spent, "num_updates", 10.0, "a whole number, at least 0"),
        (spent, "num_updates", -1, "a whole number, at least 0"),
        (spent, "noise_multiplier", math.nan, "at least 0"),
        (spent, "delta", math.nan, "in (0, 1)"),
        (spent, "accountant", "PLD", "one of pld, rdp"),
        (add_noise, "expected_batch_size", -5, "positive and finite"),
        (add_noise, "expected_batch_size", math.nan, "positive and finite"),
        (add_noise, "key", 3, "uint32 [8], such as noise_key(seed)"),
    ],
)
def test_refuses(function, key, value, allowed):
    prefix = "privacy." if function is PrivacyConfig else ""
    message = f"{prefix}{key} is {value!r}: it must be {allowed}"
    with pytest.raises(UserError, match=re.escape(message)):
        function(**{**GOOD[function], key: value})


def test_nothing_bounds_a_selection_for_replaced_records():
    relation, chosen = (
        NeighboringRelation.REPLACE_ONE,
        Selection(distribution="geometric", expected_candidates=3),
    )
    with pytest.raises(UserError, match="it must be None for REPLACE_ONE, for which"):
        calibrate(**GOOD[calibrate], neighboring_relation=relation, selection=chosen)


def test_a_batch_larger_than_the_data_is_refused():
    config = PrivacyConfig(**GOOD[PrivacyConfig])
    assert config.sampling_prob(256) == 1.0
    with pytest.raises(UserError, match=r"must be at most .* training records, 255"):
        config.sampling_prob(255)


def test_the_statement_has_words_for_each_rule_and_each_way_to_clip():
    """Without them a run would end in a traceback, after its secrets are erased."""
    assert {*RULES} == {*gradients.WEIGHTS}
    assert {*CLIPPINGS} == {*build.CLIPPED_GRADIENTS}
    assert {*performance.CLIPPINGS} == {"auto", *CLIPPINGS}
