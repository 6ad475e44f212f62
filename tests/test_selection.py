"""Private selection: what it spends, and what it draws.

How the candidates are run is tested in `test_sweep_selection.py`.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats

from dpmix_jax import (
    Mechanism,
    NeighboringRelation,
    PrivacyConfig,
    Selection,
    UserError,
    calibrate,
    privacy,
)
from dpmix_jax.run import dry_run, release, start, statement
from dpmix_jax.run.cli import load_experiment
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.selection import SHAPES
from tests import runs
from tests.conftest import ROOT

ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE
VALIDATION = 288


def choose(distribution, mean=4.0):
    return Selection(distribution=distribution, expected_candidates=mean)


# What it spends.


def by_hand(distribution, mean, rho, delta):
    """The theorems of Papernot and Steinke for rho-zCDP, minimised over Renyi orders.

    Theorem 2 (truncated negative binomial) and Theorem 6 (Poisson) of arXiv 2110.03620,
    for a candidate whose Renyi DP of order a is rho a; then Proposition 12 of Canonne
    et al. (2020) turns Renyi into approximate DP.
    """
    orders = np.concatenate([np.arange(1.01, 60, 0.01), np.arange(60, 1500, 1.0)])

    def approximate(renyi):
        terms = (math.log(1 / delta) + (orders - 1) * np.log1p(-1 / orders)) / (
            orders - 1
        ) - np.log(orders) / (orders - 1)
        return float(np.min(renyi + terms))

    if distribution == "poisson":

        def delta_at(epsilon):
            mu = math.sqrt(2 * rho)
            tails = [scipy.stats.norm.cdf(s * mu / 2 - epsilon / mu) for s in (1, -1)]
            return tails[0] - np.exp(epsilon) * tails[1]

        hats = np.array([delta_at(math.log1p(1 / (a - 1))) for a in orders])
        return approximate(rho * orders + mean * hats + math.log(mean) / (orders - 1))
    shape = SHAPES[distribution]
    low, high = 1e-12, 1 - 1e-9  # gamma, by bisection in its mean
    for _ in range(200):
        gamma = (low + high) / 2
        found = (
            (1 / gamma - 1) / math.log(1 / gamma)
            if shape == 0
            else shape * (1 - gamma) / (gamma * (1 - gamma**shape))
        )
        low, high = (gamma, high) if found > mean else (low, gamma)
    constant = (1 + shape) * np.min(
        (1 - 1 / orders) * rho * orders + math.log(1 / gamma) / orders
    )
    return approximate(rho * orders + constant + math.log(mean) / (orders - 1))


@pytest.mark.sampled("logarithmic-1.5", "geometric-10.0", "poisson-1.5")
@pytest.mark.parametrize("mean", [1.5, 10.0])
@pytest.mark.parametrize("distribution", SHAPES)
def test_epsilon_is_that_of_the_theorems(distribution, mean):
    """Full batches are one Gaussian mechanism, whose Renyi DP is known exactly."""
    mechanism = Mechanism(
        sampling_prob=1.0,
        num_updates=4,
        noise_multiplier=6.0,
        selection=choose(distribution, mean),
    )
    expected = by_hand(distribution, mean, 4 / (2 * 6.0**2), 1e-5)
    found = mechanism.epsilon(1e-5)
    # Theorem 6 takes a delta, which is exact by hand and bounded by RDP in the library,
    # and the library tries fewer orders.
    slack = 1.3 if distribution == "poisson" else 1.001
    assert 0.999 * expected <= found <= slack * expected
    alone = Mechanism(sampling_prob=1.0, num_updates=4, noise_multiplier=6.0)
    assert found > alone.epsilon(1e-5, accountant="rdp")
    assert mechanism.epsilon(1e-5, accountant="pld") == math.inf


@pytest.mark.sampled
@pytest.mark.proves("accounting.calibrate", 1)
@pytest.mark.parametrize("distribution", SHAPES)
def test_calibration_covers_the_choice(distribution):
    options = {
        "epsilon": 2.0,
        "delta": 1e-5,
        "sampling_prob": 0.1,
        "num_updates": 50,
        "neighboring_relation": NeighboringRelation.REPLACE_SPECIAL,
    }
    mechanism = calibrate(**options, selection=choose(distribution))
    assert 1.998 <= mechanism.epsilon(1e-5) <= 2.0
    assert mechanism.noise_multiplier > 1.2 * calibrate(**options).noise_multiplier


@pytest.mark.sampled("logarithmic-0.5", "geometric-8.0", "poisson-0.5")
@pytest.mark.proves("selection.Selection", 2)
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
@pytest.mark.parametrize("distribution", SHAPES)
def test_the_score_spends_what_it_may(distribution, epsilon):
    selection = choose(distribution)
    noise = selection.score_noise(epsilon, 1e-5, ADD_OR_REMOVE)
    spent = selection.score_epsilon(noise, 1e-5, ADD_OR_REMOVE)
    assert 0.999 * epsilon <= spent <= epsilon
    if distribution != "poisson":
        rho = 1 / (2 * noise**2)
        assert by_hand(distribution, 4.0, rho, 1e-5) == pytest.approx(spent, rel=2e-3)


# What it draws.


def pmf(distribution, mean, values):
    if distribution == "poisson":
        return scipy.stats.poisson.pmf(values, mean)
    if distribution == "geometric":
        return scipy.stats.geom.pmf(values, 1 / mean)
    p = scipy.optimize.brentq(
        lambda p: scipy.stats.logser.mean(p) - mean, 1e-9, 1 - 1e-9
    )
    return scipy.stats.logser.pmf(values, p)


def fits(numbers, distribution, mean):
    """Pearson's test on 0, 1, ..., 11 and more, at p = 1e-4."""
    expected = pmf(distribution, mean, np.arange(12)) * len(numbers)
    counts = np.bincount(np.minimum(numbers, 12), minlength=13)
    expected = np.append(expected, len(numbers) - expected.sum())
    likely = expected > 0
    if counts[~likely].any():
        return False
    return scipy.stats.chisquare(counts[likely], expected[likely]).pvalue > 1e-4


@pytest.mark.sampled("geometric", "poisson")
@pytest.mark.proves("selection.Selection", 1)
@pytest.mark.parametrize("distribution", SHAPES)
def test_candidates_are_drawn_as_accounted_for(distribution):
    rng = np.random.default_rng(0)
    drawn = [choose(distribution).draw(3, rng) for _ in range(20_000)]
    numbers = [len(points) for points in drawn]
    assert [name for name in SHAPES if fits(numbers, name, 4.0)] == [distribution]
    assert not fits(numbers, distribution, 4.5)
    points = np.concatenate([*map(np.array, drawn)]).astype(int)
    counts = np.bincount(points, minlength=3)
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    pairs = np.array([points[:2] for points in drawn if len(points) > 1])
    table = np.histogram2d(*pairs.T, bins=3)[0]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4
    # Nor does what they take depend on how many they are.
    firsts = [(min(len(d), 6), d[0]) for d in drawn if d]
    table = np.histogram2d(*np.array(firsts).T, bins=(6, 3))[0]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "poison"}, "privacy.selection is 'poison': it must be None or"),
        ({"expected_candidates": 1.0}, "privacy.expected_candidates is 1.0: it must"),
        (
            {"expected_candidates": None},
            "privacy.expected_candidates is None: it must be a number for",
        ),
        (
            {"selection": None},
            "privacy.expected_candidates is 3.0: it must be None without",
        ),
        (
            {"neighboring_relation": "replace_one"},
            "privacy.selection must be None for privacy.neighboring_relation",
        ),
    ],
)
def test_refuses(options, message):
    values = {"epsilon": 1.0, "expected_batch_size": 1, "num_updates": 1}
    values |= {"selection": "poisson", "expected_candidates": 3.0}
    with pytest.raises(UserError, match=message):
        PrivacyConfig(**{**values, **options})


# One candidate.


def candidate():
    return runs.config(
        data__validation_size=VALIDATION,
        privacy__selection="geometric",
        privacy__expected_candidates=3.0,
    )


def test_the_statement_covers_the_choice():
    config = PrivacyConfig(
        epsilon=2.0,
        expected_batch_size=256,
        num_updates=10,
        selection="poisson",
        expected_candidates=10.0,
    )
    mechanism = Mechanism(
        sampling_prob=0.1,
        num_updates=10,
        noise_multiplier=3.0,
        selection=config.private_selection,
    )
    facts = statement.privacy_report(
        config,
        mechanism,
        num_records=2560,
        num_parameters=10**6,
        images_per_record=8,
        secret_seed=True,
        sensitivity=1.0,
    )
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["epsilon_pld"] is None
    spent = facts["epsilon_rdp"], facts["selection"]["score_epsilon"]
    assert facts["epsilon"] == max(spent) <= 2.0
    text = " ".join(statement.statement(facts).split())
    for words in (
        f"({statement.round_up(facts['epsilon'])}, 1e-05)-differentially private,"
        " tuning included, if `experiments/sweep.py` has selected this run.",
        "one training or validation record: an image",
        "two pairs of training and validation set are neighbours if",
        "Of other candidates nothing is released",
        "the choice among them to the validation records, so that tuning is covered",
        "Not covered: how many candidates there were",
        "(poisson distribution, mean 10)",
        f"of standard deviation {facts['selection']['score_noise']:.6g}",
        "PLD bounds nothing here, epsilon = ",
        "for a validation record, at the same delta",
    ):
        assert words in text, words
    with pytest.raises(ValueError, match="must agree on the selection"):
        statement.privacy_report(
            config,
            dataclasses.replace(mechanism, selection=None),
            num_records=2560,
            num_parameters=10**6,
            images_per_record=8,
            secret_seed=True,
            sensitivity=1.0,
        )
    assert "hyperparameters chosen by looking at them" not in text


def test_a_selection_needs_validation_records():
    with pytest.raises(UserError) as error:
        load_experiment(
            [
                f"--config={ROOT}/configs/digits.py",
                "--config.privacy.selection=poisson",
                "--config.privacy.expected_candidates=5",
            ]
        )
    assert str(error.value) == (
        "data.validation_size is 0: it must be positive for privacy.selection, which"
        " compares runs by validation records"
    )


@pytest.mark.parametrize("seed", [None, 7])
def test_the_score_is_the_noisy_count(seed):
    config = dataclasses.replace(candidate(), seed=seed)
    scores = np.array([release.score(35, 30.0, config) for _ in range(4000)])
    assert scores.dtype == int
    if seed is None:
        assert abs(scores.mean() - 35) < 5 * 30.0 / math.sqrt(len(scores))
        assert abs(scores.std() / 30.0 - 1) < 5 / math.sqrt(2 * len(scores))
    else:
        assert len(set(scores)) == 1


@pytest.mark.sampled
def test_a_candidate_that_goes_on_is_accounted_for_as_before(tmp_path):
    config = candidate().privacy
    began = start.mechanism_of(config, 0.1, Workdir(tmp_path))
    assert began.selection == config.private_selection
    Workdir(tmp_path).begin(None, data="", noise_multiplier=began.noise_multiplier)
    assert start.mechanism_of(config, 0.1, Workdir(tmp_path)) == began


def test_a_dry_run_calibrates_for_the_selection(monkeypatch):
    class AskedError(Exception):
        pass

    def calibrate(**options):
        assert options["selection"] == choose("geometric", 3.0)
        raise AskedError

    monkeypatch.setattr(privacy, "calibrate", calibrate)
    with pytest.raises(AskedError):
        dry_run.dry_run(candidate())


def test_a_choice_that_no_noise_makes_private_is_one_line():
    with pytest.raises(
        UserError, match=r"privacy.expected_candidates is 100: no noise"
    ):
        choose("poisson", 100.0).score_noise(1e-4, 1e-5, ADD_OR_REMOVE)
    enough = choose("geometric").score_noise(2000.0, 1e-5, ADD_OR_REMOVE)
    assert choose("geometric").score_epsilon(enough, 1e-5, ADD_OR_REMOVE) <= 2000
