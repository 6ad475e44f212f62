"""Correlated noise: its error, its sampler, its accounting, and a run with it."""

import contextlib
import dataclasses
import json
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.optimize
import scipy.stats
from jax_privacy.experimental import accounting as of_jax_privacy

from dpmix_jax import (
    Mechanism,
    NeighboringRelation,
    UserError,
    accounting,
    calibrate,
    clipped_gradient,
    factorization,
    noise,
    noise_key,
    poisson_batch,
    privatizer,
)
from dpmix_jax.accounting import noise_by_rdp
from dpmix_jax.noise import grid
from dpmix_jax.privacy import NoiseState, without_sums
from dpmix_jax.run import build, ledger
from dpmix_jax.run.workdir import Workdir
from tests import toy
from tests.runs import config, run

C = (0.8, 0.5, 0.33)
T = 12


def matrix(strategy, size):
    """The banded Toeplitz matrix of a strategy."""
    return sum(c * np.eye(size, k=-k) for k, c in enumerate(strategy))


def mechanism(**changes):
    options = {"sampling_prob": 0.2, "num_updates": T, "noise_multiplier": 1.5}
    return Mechanism(**(options | {"strategy": C} | changes))


def test_the_error_is_that_of_the_matrices():
    sums = np.tril(np.ones((T, T))) @ np.linalg.inv(matrix(C, T))
    expected = np.sqrt(np.square(sums).sum(1).mean()) * np.linalg.norm(C)
    assert factorization.error(C, T) == pytest.approx(expected)
    doubled = tuple(2 * c for c in C)
    assert factorization.error(doubled, T) == pytest.approx(expected)
    independent = factorization.error(factorization.INDEPENDENT, T)
    assert independent == pytest.approx(math.sqrt((T + 1) / 2))


@pytest.mark.sampled
def test_no_strategy_near_by_has_less_error():
    """Against a search of our own, over two coefficients of norm 1."""
    best = scipy.optimize.minimize_scalar(
        lambda angle: factorization.error((math.cos(angle), math.sin(angle)), 100),
        bounds=(0, 1.5),
        method="bounded",
    )
    found = factorization.strategy(100, 2)
    assert np.linalg.norm(found) == pytest.approx(1)
    assert factorization.error(found, 100) == pytest.approx(best.fun, rel=1e-5)
    assert factorization.strategy(100, 1) == factorization.INDEPENDENT
    for bands in (0, 101):
        with pytest.raises(UserError, match=rf"bands is {bands}: it must be in"):
            factorization.strategy(100, bands)


def noisy(strategy, sums, *, sigma=1.5, key=0):
    """What the privatizer makes of the sums of each update [T, d], and its states."""
    gradient_fn = clipped_gradient(lambda w, x: w @ x, l2_clip_norm=0.5)
    add = privatizer(
        gradient_fn,
        mechanism(strategy=strategy, noise_multiplier=sigma),
        expected_batch_size=1.0,
        key=noise_key(key),
    )
    states, found = [add.init(jnp.zeros(sums.shape[1]))], []
    update = jax.jit(add.update)
    for total in jnp.asarray(sums, jnp.float32):
        out, state = update(total, states[-1])
        found.append(np.asarray(out, np.float64))
        states.append(state)
    return np.array(found), states


@pytest.mark.sampled("3.0")
@pytest.mark.proves("privacy.privatizer", 1, 4)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_weighted_by_the_strategy_the_noise_is_independent(scale):
    """Whatever the norm of the strategy, for the noise is scaled by it."""
    strategy = tuple(scale * c for c in C)
    found, _ = noisy(strategy, np.zeros((T, 20_000)))
    z = matrix(strategy, T) @ found
    expected = 1.5 * 0.5 * np.linalg.norm(strategy)
    assert z.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * z.size))
    last = mechanism(strategy=strategy).noise_stddev(0.5)
    assert found[-1].std() == pytest.approx(last, rel=5 / math.sqrt(2 * z.shape[1]))
    limit = 6 / math.sqrt(z.shape[1])
    assert np.abs(np.corrcoef(z)[np.triu_indices(T, 1)]).max() < limit
    assert np.corrcoef(found)[0, 1] < -0.5  # while what is added is not


@pytest.mark.proves("privacy.privatizer", 4)
def test_noise_does_not_depend_on_the_sums():
    sums = np.random.default_rng(0).normal(size=(T, 50)).astype(np.float32)
    alone, _ = noisy(C, 0 * sums)
    found, states = noisy(C, sums)
    np.testing.assert_allclose(found - sums, alone, atol=1e-5)
    np.testing.assert_array_equal(states[-1].sums, sums[:-3:-1])
    np.testing.assert_array_equal(states[-1].outputs, found[:-3:-1])


@pytest.mark.proves("privacy.privatizer", 4)
def test_what_needs_privacy_is_a_weighted_sum_with_noise_on_the_grid():
    """A record that moves one sum moves b of them, on the grid, by |c| / c_0 in all.

    Outputs of before do not come into it, whatever they are.
    """
    ones, step = np.random.default_rng(0).normal(size=(T, 4096)).astype("f"), 5
    other = ones.copy()
    other[step] += 0.5 / 64  # of L2 norm 0.5, the clip norm
    on = grid(1.5, 0.5 * np.linalg.norm(C) / C[0], 3 * 4096)
    seen = []
    with (
        jax.disable_jit(),  # totals are numbers
        mock.patch.object(
            noise, "add_noise", lambda total, _, used: seen.append((total, used))
        ),
    ):
        for sums in (ones, other):
            state, blank = None, jnp.zeros((2, 4096))
            add = privatizer(
                clipped_gradient(lambda w, x: w @ x, l2_clip_norm=0.5),
                mechanism(),
                expected_batch_size=1.0,
                key=noise_key(0),
            )
            for t in range(T):
                past = jnp.asarray(sums[:t][::-1][:2])
                past = jnp.concatenate([past, blank])[:2]
                state = NoiseState(noise_key(0), past, blank)
                with contextlib.suppress(TypeError):  # the noise is None
                    add.update(jnp.asarray(sums[t]), state)
    totals, used = zip(*seen, strict=True)
    assert set(used) == {on}  # of three roundings
    rounded = np.round(np.array(totals, np.float64) / on.spacing)
    first, second = rounded.reshape(2, T, -1)
    moved = np.linalg.norm((first - second)[step : step + 3]) * on.spacing
    allowed = on.stddev / 1.5
    assert 0.999 * allowed < moved <= allowed * (1 + 1e-5)
    assert (first == second)[:step].all()
    assert (first == second)[step + 3 :].all()


@pytest.mark.proves("privacy.privatizer", 2)
def test_what_is_left_has_no_sum_without_noise():
    _, states = noisy(C, np.ones((T, 5)))
    trained = (states[-1], {"momentum": jnp.ones(5)})
    (left, momentum), (before, _) = without_sums(trained), trained
    assert not left.sums.any()
    assert before.sums.all()
    np.testing.assert_array_equal(left.key, before.key)
    np.testing.assert_array_equal(momentum["momentum"], jnp.ones(5))


def turns(bands, seeds=range(40), num_records=60, q=0.2):
    """[seeds, T, N] bool: which records are in which batch."""
    found = np.zeros((len(seeds), T, num_records), bool)
    for i, seed in enumerate(seeds):
        for step in range(T):
            batch = poisson_batch(
                seed, step, num_records=num_records, sampling_prob=q, bands=bands
            )
            assert len(set(batch.tolist())) == len(batch)
            found[i, step, batch] = True
    return found


@pytest.mark.proves("sampling.poisson_batch", 3)
@pytest.mark.parametrize("bands", [2, 3, 5])
def test_a_record_takes_part_in_its_turn_alone(bands):
    """So the bands of two of its terms never meet, and it has at most T / b of them."""
    found = turns(bands)
    for batches in found.transpose(0, 2, 1).reshape(-1, T):
        assert len({step % bands for step in np.flatnonzero(batches)}) <= 1
        assert batches.sum() <= -(-T // bands)
    # The share of turns that are used, and how the records are divided into them.
    used = found.sum() / (found.shape[0] * found.shape[2] * T / bands)
    assert used == pytest.approx(bands * 0.2, rel=0.03)
    whole = T - T % bands
    counts = found[:, :whole].reshape(len(found), -1, bands, found.shape[2])
    assert scipy.stats.chisquare(counts.sum((0, 1, 3))).pvalue > 1e-3


def test_turns_are_drawn_for_each_record_alone():
    """Their numbers vary as those of independent draws: no equal split, no order."""
    sizes, pairs = [], []
    for seed in range(400):
        batch = poisson_batch(seed, 0, num_records=40, sampling_prob=0.5, bands=2)
        sizes.append(len(batch))
        pairs.append({0, 1} <= {*batch.tolist()})
    # Binomial of 40 records at 1/2; records 0 and 1 share a turn with probability 1/2.
    assert np.var(sizes) == pytest.approx(10, rel=0.25)
    assert np.mean(pairs) == pytest.approx(0.25, abs=0.07)
    for seed in range(5):
        assert not len(
            poisson_batch(seed, 1, num_records=1, sampling_prob=0.5, bands=2)
        ) or not len(poisson_batch(seed, 0, num_records=1, sampling_prob=0.5, bands=2))


@pytest.mark.parametrize(("updates", "bands"), [(12, 3), (13, 3), (280, 7), (5, 5)])
def test_the_event_is_that_of_jax_privacy(updates, bands):
    ours = mechanism(
        sampling_prob=0.1, num_updates=updates, strategy=(1.0,) + (0.1,) * (bands - 1)
    )
    theirs = of_jax_privacy.amplified_bandmf_event(
        noise_multiplier=1.5,
        iterations=updates,
        num_bands=bands,
        sampling_prob=0.1 * bands,
    )
    assert ours.event() == theirs


@pytest.mark.parametrize(("updates", "participations"), [(12, 3), (13, 4), (4, 1)])
def test_in_every_turn_it_is_a_gaussian_mechanism(updates, participations):
    """At b q = 1, by the closed form of Balle and Wang (2018, Theorem 8)."""
    found = mechanism(
        sampling_prob=0.25,
        num_updates=updates,
        strategy=(1.0, 0.2, 0.1, 0.1),
        noise_multiplier=4.0,
    ).epsilon(1e-5)
    mu, normal = math.sqrt(participations) / 4.0, scipy.stats.norm
    delta = normal.cdf(mu / 2 - found / mu) - math.exp(found) * normal.cdf(
        -mu / 2 - found / mu
    )
    assert delta == pytest.approx(1e-5, rel=2e-3)


@pytest.mark.sampled
def test_the_number_of_bands_is_that_of_least_error(monkeypatch):
    """With the noise that RDP finds; then the noise is by PLD."""
    errors = {}
    for bands in (1, 2, 3):
        strategy = factorization.strategy(64, bands)
        each = mechanism(sampling_prob=0.3, num_updates=64, strategy=strategy)
        sigma = noise_by_rdp(each, 8.0, 1e-5)
        spent = dataclasses.replace(each, noise_multiplier=sigma)
        assert spent.epsilon(1e-5, accountant="rdp") == pytest.approx(8, rel=1e-3)
        errors[bands] = sigma * factorization.error(strategy, 64)
    best = min(errors, key=errors.__getitem__)
    silent = mechanism(sampling_prob=0.3, num_updates=64, strategy=(1.0,))
    assert accounting._least_error(silent, 8.0, 1e-5) == best > 1
    replaced = dataclasses.replace(
        silent, neighboring_relation=NeighboringRelation.REPLACE_ONE
    )
    assert accounting._least_error(replaced, 8.0, 1e-5) == 1  # RDP bounds nothing
    monkeypatch.setattr(accounting, "_cached", lambda f, *args: f(*args))
    monkeypatch.setattr(accounting, "_least_error", lambda *_: 2)
    budget = {"epsilon": 1.0, "delta": 1e-5, "sampling_prob": 0.3, "num_updates": 6}
    chosen = calibrate(**budget, bands=None)
    assert chosen.strategy == factorization.strategy(6, 2)
    assert 0.99 < chosen.epsilon(1e-5) <= 1


def test_refuses():
    with pytest.raises(UserError, match=r"bands is 3: it must be at most 1 / samp"):
        mechanism(sampling_prob=0.34)
    with pytest.raises(UserError, match=r"strategy\[0\] is 0.0: it must be positive"):
        mechanism(strategy=())
    with pytest.raises(UserError, match=r"strategy is .*inf.*: it must be of finite"):
        mechanism(strategy=(1.0, math.inf))


def test_the_ledger_counts_turns(tmp_path):
    """As updates of their own probability, for readers that know no turns."""
    book = ledger.Ledger(tmp_path / "book.jsonl")
    spent = mechanism(num_updates=13)
    book.spend(spent, epsilon=1.0, delta=1e-5, workdir="")
    (run,) = book.runs()
    assert run.mechanism.event() == spent.event()
    assert run.mechanism.bands == 1
    assert run.mechanism.num_updates == 5


BANDED = {"privacy__mechanism": "bandmf", "privacy__bands": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("bandmf") / "run"
    done = run(path, **BANDED)
    assert done.status == 0, done.err
    assert ", 3 bands" in done.err
    return path


@pytest.mark.sampled
def test_a_run_says_how_its_noise_is_correlated_and_keeps_none_of_it(finished):
    report = json.loads((finished / "privacy.json").read_text())
    assert len(report["strategy"]) == 3
    claimed = mechanism(
        sampling_prob=report["sampling_prob"],
        noise_multiplier=report["noise_multiplier"],
        strategy=tuple(report["strategy"]),
    )
    assert claimed.epsilon(1e-5) == pytest.approx(report["epsilon"], rel=1e-6)
    text = " ".join((finished / "PRIVACY.md").read_text().split())
    for words in (
        "of the norm of a strategy of 3 bands (1)",
        "cyclic Poisson sampling with q",
        "drawn with 3 times the probability q, otherwise not",
        "the accountant counts 4 updates",
    ):
        assert words in text
    (last,) = (finished / "checkpoints").iterdir()
    left = safetensors.numpy.load_file(last)
    (name,) = [name for name in left if name.endswith("sums")]
    assert left[name].shape[0] == 2
    assert not left[name].any()


@pytest.mark.sampled
def test_a_run_that_goes_on_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
    """Killed at update 7, and with a strategy of its own that it must keep."""
    from dpmix_jax.run.checkpoint import Checkpoints

    class Killed(BaseException):
        pass

    save = Checkpoints.save

    def killed_at_seven(self, state):
        save(self, state)
        if int(state.step) == 6:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", killed_at_seven)
    with pytest.raises(Killed):
        run(tmp_path / "run", **BANDED)
    monkeypatch.undo()
    secret = Workdir(tmp_path / "run").kept()
    assert secret is not None
    assert len(secret["strategy"]) == 3
    monkeypatch.setattr(factorization, "strategy", lambda *_: pytest.fail("again"))
    done = run(tmp_path / "run", **BANDED)
    assert done.status == 0, done.err
    assert "going on after update 6" in done.err
    one, other = (
        (path / "model.safetensors").read_bytes()
        for path in (finished, tmp_path / "run")
    )
    assert one == other


def test_a_run_draws_the_batches_that_it_accounts_for():
    terms = build._terms(
        config(**BANDED),
        toy.records(60),
        seed=1,
        mechanism=mechanism(),
        num_devices=1,
    )
    for step in range(T):
        (drawn,) = terms.indices(60)(step)
        expected = poisson_batch(1, step, num_records=60, sampling_prob=0.2, bands=3)
        np.testing.assert_array_equal(drawn.data[~drawn.mask], expected)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"privacy__mechanism": "laplace"}, "must be one of gaussian, bandmf"),
        ({"privacy__bands": 2}, "must be None for privacy.mechanism 'gaussian'"),
        (BANDED | {"privacy__bands": 0}, "bands is 0: it must be in [1, 12]"),
        (BANDED | {"privacy__bands": 9}, "bands is 9: it must be at most 1 / sampling"),
        (
            BANDED
            | {
                "method__name": "microbatch_mixup",
                "method__k_base": 1,
                "method__k_self": 0,
            },
            "must be 'gaussian' for method.name 'microbatch_mixup'",
        ),
    ],
)
def test_refuses_in_one_line(tmp_path, wrong, why):
    done = run(tmp_path / "run", **wrong)
    assert done.status == 2
    assert why in done.err
    assert not (tmp_path / "run" / "secret.json").exists()


@pytest.mark.sampled
def test_a_replaced_mechanism_counts_its_first_updates():
    first = dataclasses.replace(mechanism(), num_updates=4)
    assert first.event() == dataclasses.replace(mechanism(), num_updates=6).event()
    assert first.epsilon(1e-5) < mechanism().epsilon(1e-5)
