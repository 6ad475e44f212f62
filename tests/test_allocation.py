import json
import math
import sys
import types

import dp_accounting
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from dp_accounting import NeighboringRelation, pld

from dpmix_jax import Mechanism, UserError, allocation, batches, sampling
from dpmix_jax import calibrate as calibrate_mechanism
from dpmix_jax.allocation import calibrate, epsilon
from dpmix_jax.run import ledger
from dpmix_jax.sampling import allocated_batch
from tests import runs

PLD_accounting = allocation._library()  # as an import it would warn without numba

N, T, EPOCHS = 40, 5, 3000


def drawn(sampler):
    """[EPOCHS, N] the batch of its epoch in which a record is; each must be in one."""
    places = np.full((EPOCHS, N), -1)
    for step in range(EPOCHS * T):
        batch = sampler(0, step)
        assert (places[step // T, batch] == -1).all()
        places[step // T, batch] = step % T
    assert (places >= 0).all()
    return places


def allocated(seed, step):
    return allocated_batch(seed, step, num_records=N, batches_per_epoch=T)


def shuffled(seed, step):
    """What a shuffling loader does instead: batches of one size."""
    epoch, place = divmod(step, T)
    order = np.random.default_rng([seed, epoch]).permutation(N)
    return order[place * N // T : (place + 1) * N // T]


def cyclic(seed, step):
    """Random places in the first epoch, and the same in those that follow."""
    return allocated(seed, step % T)


def skewed(seed, step):
    """The last batch has some records that are due in the first."""
    places = np.random.default_rng([seed, step // T]).integers(T, size=N)
    moves = np.random.default_rng([seed, step // T, 1]).random(N) < 0.1
    places[(places == 0) & moves] = T - 1
    return np.flatnonzero(places == step % T)


def p_values(places):
    """Two-sided p-values of what random allocation means."""
    chance = 1 / T
    spread = chance * (1 - chance)
    inside = (places[..., None] == np.arange(T)).astype(float)
    records = np.sum((inside.sum(0) - EPOCHS * chance) ** 2) / (EPOCHS * chance)
    sizes = np.sum((inside.sum(1) - N * chance) ** 2) / (N * chance)
    first, second = np.triu_indices(N, 1)
    together = (places[:, first] == places[:, second]).sum(0)
    pairs = np.sum((together - EPOCHS * chance) ** 2) / (EPOCHS * spread)
    again = (places[1:] == places[:-1]).sum(0)
    stays = np.sum((again - (EPOCHS - 1) * chance) ** 2) / ((EPOCHS - 1) * spread)
    return {
        "batches of a record": two_sided(records, N * (T - 1)),
        "batch sizes": two_sided(sizes, EPOCHS * (T - 1)),
        "pairs": two_sided(pairs, len(first)),
        "consecutive epochs": two_sided(stays, N),
    }


def two_sided(chi2, degrees):
    below = scipy.stats.chi2(degrees).cdf(chi2)
    return 2 * min(below, 1 - below)


@pytest.mark.proves("sampling.allocated_batch", 1)
def test_each_record_is_in_one_batch_of_an_epoch_independently():
    assert min(p_values(drawn(allocated)).values()) > 1e-3


@pytest.mark.sampled("shuffled-caught0")
@pytest.mark.parametrize(
    ("sampler", "caught"),
    [
        (shuffled, {"batch sizes", "pairs"}),
        (cyclic, {"batches of a record", "consecutive epochs"}),
        (skewed, {"batches of a record"}),
    ],
)
def test_the_check_catches(sampler, caught):
    found = p_values(drawn(sampler))
    assert {name for name, value in found.items() if value < 1e-9} >= caught


@pytest.mark.proves("sampling.allocated_batch", 2)
def test_a_batch_is_a_function_of_seed_and_step():
    for step in (0, 7, 10**6):
        np.testing.assert_array_equal(allocated(5, step), allocated(5, step))
        assert allocated(5, step).dtype == np.int32
    assert len({allocated(5, step).tobytes() for step in range(50)}) == 50
    assert len({allocated(seed, 3).tobytes() for seed in range(50)}) == 50


@pytest.mark.proves("sampling.allocated_batch", 3)
@pytest.mark.parametrize("batches", [1, 2, 3, 7, 64, 100, 1000, 2**31 + 1, 2**40])
def test_another_record_at_the_end_moves_no_other(batches):
    """The more than 2^31 reject many draws, the most numbers are drawn otherwise."""
    for epoch in range(20):
        places = [
            sampling.generator(1, "allocation", epoch).integers(batches, size=size)
            for size in (1, 99, 100, 1001)
        ]
        for fewer in places:
            np.testing.assert_array_equal(fewer, places[-1][: len(fewer)])
        step = epoch * batches + int(places[1][0])
        for size in (99, 100):
            batch = allocated_batch(
                1, step, num_records=size, batches_per_epoch=batches
            )
            assert 0 in batch
            np.testing.assert_array_equal(
                batch[batch < 99], np.flatnonzero(places[1] == places[1][0])
            )


def spent(noise_multiplier, batches, epochs, delta=1e-5):
    return epsilon(
        noise_multiplier,
        num_updates=batches * epochs,
        batches_per_epoch=batches,
        delta=delta,
    )


def losses(noise_multiplier, batches, epochs, samples, rng):
    """Samples of log P/Q under P, and of log Q/P under Q, of what bounds an epoch.

    Q is noise on a sum of nothing in all batches; P has a term 1 in one of them.
    """

    def log_ratio(x):
        terms = (x - 0.5) / noise_multiplier**2
        return np.log(np.mean(np.exp(terms), axis=-1)).sum(axis=-1)

    q = noise_multiplier * rng.standard_normal((2, samples, epochs, batches))
    q[0, ..., 0] += 1  # whichever batch it is
    return log_ratio(q[0]), -log_ratio(q[1])


@pytest.mark.sampled("1.0-7-1", "2.0-3-6")
@pytest.mark.proves("allocation.epsilon", 1)
@pytest.mark.parametrize(
    ("noise_multiplier", "batches", "epochs"),
    [(1.0, 7, 1), (0.7, 7, 1), (1.0, 7, 4), (2.0, 3, 6)],
)
def test_epsilon_is_that_of_samples_of_the_mechanism(noise_multiplier, batches, epochs):
    """Its delta lies below what is claimed, in both directions, and in one near it."""
    samples = 400_000
    rng = np.random.default_rng(0)
    loss = losses(noise_multiplier, batches, epochs, samples, rng)
    for delta in (0.1, 0.01):
        claimed = spent(noise_multiplier, batches, epochs, delta)
        excess = [-np.expm1(np.minimum(claimed - part, 0)) for part in loss]
        deltas = [float(part.mean()) for part in excess]
        errors = [float(part.std()) / math.sqrt(samples) for part in excess]
        for found, error in zip(deltas, errors, strict=True):
            assert found - 4 * error <= delta
        assert max(deltas) + 4 * max(errors) >= 0.98 * delta


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("noise_multiplier", "batches", "epochs"), [(1.5, 4, 3), (1.0, 7, 1)]
)
def test_epsilon_is_just_above_the_lower_bound(noise_multiplier, batches, epochs):
    lower = PLD_accounting.gaussian_allocation_epsilon_configurable(
        params=PLD_accounting.PrivacyParams(
            sigma=noise_multiplier, num_steps=batches, num_epochs=epochs, delta=1e-5
        ),
        config=PLD_accounting.AllocationSchemeConfig(
            loss_discretization=0.02,
            tail_truncation=1e-9,
            convolution_method=PLD_accounting.ConvolutionMethod.GEOM,
        ),
        bound_type=PLD_accounting.BoundType.IS_DOMINATED,
    )
    assert lower <= spent(noise_multiplier, batches, epochs) <= 1.01 * lower


# (sigma, t, epochs, epsilon at 1e-5). Computed apart from the accountant: the weights
# of an epoch's batches rounded to the nearest of equal steps, their sum and the sum of
# the losses by FFT; two step sizes agree to 2e-4. It bounds nothing, and is no further
# off than that.
NEAREST = [
    (4.0, 7, 40, 2.4722),
    (6.0, 12, 200, 2.8382),
    (1.0, 7, 1, 2.5089),
    (0.8, 10, 5, 6.6449),
    (0.6, 30, 2, 5.7934),  # on steps of the loss
]


@pytest.mark.sampled
@pytest.mark.parametrize(("noise_multiplier", "batches", "epochs", "value"), NEAREST)
def test_epsilon_is_near_another_computation(noise_multiplier, batches, epochs, value):
    assert value <= spent(noise_multiplier, batches, epochs) <= 1.005 * value


def test_one_batch_an_epoch_is_the_gaussian_mechanism():
    by_pld = pld.PLDAccountant().compose(dp_accounting.GaussianDpEvent(3.0), 10)
    assert spent(3.0, 1, 10) == pytest.approx(by_pld.get_epsilon(1e-5), rel=1e-3)


def test_it_is_about_that_of_poisson_sampling():
    poisson = Mechanism(sampling_prob=1 / 7, num_updates=280, noise_multiplier=4.0)
    assert 0.9 < spent(4.0, 7, 40) / poisson.epsilon(1e-5) < 1.0


@pytest.mark.sampled
def test_less_noise_and_more_epochs_spend_more():
    by_noise = [spent(sigma, 5, 4) for sigma in (8.0, 2.0, 0.5, 0.1, 0.01)]
    by_epochs = [spent(2.0, 5, epochs) for epochs in (0, 1, 2, 10)]
    for values in (by_noise, by_epochs):
        assert (np.diff(values) > 0).all()


@pytest.mark.proves("allocation.epsilon", 2)
@pytest.mark.parametrize("noise_multiplier", [0.01, 0.5, 2.0])
def test_it_is_no_more_than_without_amplification(noise_multiplier, monkeypatch):
    """Nor where rounding is so coarse that the bound would be worse."""
    plain = dp_accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(2), 1e-5)
    monkeypatch.setattr(allocation, "_ROUNDING", 2.0)
    monkeypatch.setattr(allocation, "_LOSS_POINTS_OF_TERMS", 50)
    allocation._epsilon.cache_clear()
    coarse = spent(noise_multiplier, 3, 2)
    allocation._epsilon.cache_clear()
    assert 0 < coarse <= plain


def test_an_incomplete_epoch_counts_as_a_whole_one():
    def at(num_updates):
        return epsilon(2.0, num_updates=num_updates, batches_per_epoch=5, delta=1e-5)

    assert at(0) == 0
    assert at(5) < at(6) == at(10) < at(11)


@pytest.mark.sampled("1.0-4-20")
@pytest.mark.proves("allocation.calibrate", 1)
@pytest.mark.parametrize(
    ("target", "batches", "updates"),
    [(1.0, 4, 20), (3.0, 4, 19), (0.5, 1, 3)],
)
def test_calibration_meets_the_budget_and_wastes_nothing(target, batches, updates):
    rest = {"num_updates": updates, "batches_per_epoch": batches, "delta": 1e-5}
    sigma = calibrate(epsilon=target, **rest)
    assert epsilon(sigma, **rest) <= target < epsilon((1 - 1e-4) * sigma, **rest)


def test_calibration_does_not_trust_the_root_finder(monkeypatch):
    def low(*args, **options):
        return brentq(*args, **options) - 4e-5

    brentq = scipy.optimize.brentq
    fake = types.SimpleNamespace(optimize=types.SimpleNamespace(brentq=low))
    monkeypatch.setattr(allocation, "scipy", fake)
    rest = {"num_updates": 3, "batches_per_epoch": 1, "delta": 1e-5}
    assert epsilon(calibrate(epsilon=2.0, **rest), **rest) <= 2.0


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (spent, (0.0, 7, 1), "noise_multiplier is 0.0"),
        (spent, (float("nan"), 7, 1), "noise_multiplier is nan"),
        (spent, (1.0, 0, 1), "batches_per_epoch is 0"),
        (spent, (1.0, 7, -1), "num_updates is -7"),
        (spent, (1.0, 7, 1, 1e-11), "delta is 1e-11"),
        (spent, (1.0, 7, 1, 1.0), "delta is 1.0"),
        (allocated, (0, -1), "step is -1"),
        (
            lambda target: calibrate(
                epsilon=target, delta=1e-5, num_updates=1, batches_per_epoch=1
            ),
            (0.0,),
            "epsilon is 0.0",
        ),
    ],
)
def test_refuses(function, options, message):
    with pytest.raises(UserError, match=message):
        function(*options)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PLD_accounting", None)
    with pytest.raises(UserError, match=r'pip install "dpmix_jax\[allocation\]"'):
        spent(1.2345, 7, 1)


# --- Of runs ----------------------------------------------------------------------


def test_a_mechanism_answers_by_the_accountant_of_its_sampling():
    options = {"sampling_prob": 1 / 7, "num_updates": 14, "noise_multiplier": 3.0}
    found = Mechanism(**options, allocated=True)
    expected = epsilon(3.0, num_updates=14, batches_per_epoch=7, delta=1e-5)
    assert found.epsilon(1e-5) == expected != Mechanism(**options).epsilon(1e-5)
    assert found.epsilon(1e-5, accountant="rdp") == float("inf")
    with pytest.raises(UserError, match="it has no event"):
        found.event()
    budget = {"epsilon": 2.0, "delta": 1e-5, "sampling_prob": 1 / 7, "num_updates": 14}
    calibrated = calibrate_mechanism(**budget, allocated=True)
    assert 1.99 < calibrated.epsilon(1e-5) <= 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling_prob": 0.3}, "must be one over a whole number for random alloc"),
        ({"strategy": (0.8, 0.6)}, "bands is 2: it must be 1 for random allocation"),
        ({"neighboring_relation": NeighboringRelation.REPLACE_ONE}, "is 'REPLACE_ONE'"),
    ],
)
def test_a_mechanism_refuses(changes, message):
    options = {"sampling_prob": 1 / 7, "num_updates": 14, "noise_multiplier": 3.0}
    with pytest.raises(UserError, match=message):
        Mechanism(**(options | changes), allocated=True)


def test_batches_are_those_of_the_epochs():
    draw = batches(
        5, num_records=N, sampling_prob=1 / T, microbatch_size=8, allocated=True
    )
    for step in (0, 3, T + 1):
        found = np.concatenate([part.data[~part.mask] for part in draw(step)])
        np.testing.assert_array_equal(found, allocated(5, step))


ALLOCATED = {
    "privacy__sampling": "allocation",
    "privacy__expected_batch_size": 359,  # 4 batches of 1,437 records
    "privacy__num_updates": 8,
    "logging__log_every": 8,  # each line asks for an epsilon
    "logging__eval_every": 8,
}


@pytest.mark.sampled
def test_a_run_uses_every_record_once_an_epoch_and_says_so(tmp_path, monkeypatch):
    drawn = []
    original = sampling.allocated_batch
    monkeypatch.setattr(
        sampling,
        "allocated_batch",
        lambda seed, step, **options: (
            drawn.append(original(seed, step, **options)) or drawn[-1]
        ),
    )
    done = runs.run(tmp_path / "run", **ALLOCATED)
    assert done.status == 0, done.err
    assert len(drawn) == 8
    for epoch in (drawn[:4], drawn[4:]):
        assert sorted(np.concatenate(epoch)) == list(range(1437))
    report = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert report["sampling_prob"] == 0.25
    assert report["epsilon_rdp"] is None
    spent = epsilon(
        report["noise_multiplier"], num_updates=8, batches_per_epoch=4, delta=1e-5
    )
    assert report["epsilon"] == pytest.approx(spent, rel=1e-6)
    text = " ".join((tmp_path / "run" / "PRIVACY.md").read_text().split())
    assert "assumes random allocation with q = 0.25" in text
    assert "in an epoch of 4 updates each record is in one batch" in text
    assert "RDP bounds nothing here" in text
    assert ", pld-accounting 2." in text


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"privacy__sampling": "shuffle"}, "must be one of poisson, allocation"),
        (
            ALLOCATED | {"privacy__expected_batch_size": 256},
            "is 256: it must be 1437 records over a whole number of batches, such as"
            " 240",
        ),
        (
            ALLOCATED | {"privacy__mechanism": "bandmf"},
            "must be 'gaussian' for privacy.sampling 'allocation'",
        ),
        (
            ALLOCATED | {"privacy__neighboring_relation": "replace_one"},
            "must be 'add_or_remove_one' for privacy.sampling",
        ),
    ],
)
def test_a_run_refuses(tmp_path, wrong, why):
    done = runs.run(tmp_path / "run", **wrong)
    assert done.status == 2
    assert why in done.err


def test_the_ledger_adds_up_what_it_cannot_compose(tmp_path):
    book = ledger.Ledger(tmp_path / "book.jsonl")
    options = {"sampling_prob": 1 / 7, "num_updates": 14, "noise_multiplier": 3.0}
    spent = [Mechanism(**options, allocated=True), Mechanism(**options)]
    for each in spent:
        book.spend(each, epsilon=1.0, delta=1e-5, workdir="")
    assert [run.mechanism for run in book.runs()] == spent
    total = ledger.composed(book.runs(), 1e-5)
    assert total == pytest.approx(sum(each.epsilon(5e-6) for each in spent))
