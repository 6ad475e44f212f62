"""What runs on the same records spend together."""

import json
import os
import stat

import dp_accounting
import numpy as np
import pytest
from dp_accounting import NeighboringRelation

from dpmix_jax import Mechanism, Selection, UserError
from dpmix_jax.data import Dataset
from dpmix_jax.run import ledger
from dpmix_jax.run.statement import round_up
from tests import runs, toy
from tests.conftest import ROOT
from tests.programs import call

FULL = Mechanism(sampling_prob=1.0, num_updates=4, noise_multiplier=8.0)


@pytest.fixture
def book(tmp_path):
    return ledger.Ledger(tmp_path / "ledger" / "records.jsonl")


def spent(*mechanisms, epsilon=1.0):
    return [ledger.Spent(each, 1e-5, epsilon, "/runs/a", "") for each in mechanisms]


def spend(book, mechanism=FULL, epsilon=1.0):
    book.spend(mechanism, epsilon=epsilon, delta=1e-5, workdir="/runs/a")


def test_runs_are_written_down_in_order(book):
    assert book.runs() == []
    other = Mechanism(
        sampling_prob=0.1,
        num_updates=3,
        noise_multiplier=2.0,
        neighboring_relation=NeighboringRelation.REPLACE_ONE,
        selection=None,
    )
    chosen = Mechanism(
        sampling_prob=0.1,
        num_updates=3,
        noise_multiplier=2.0,
        selection=Selection(distribution="poisson", expected_candidates=5),
    )
    for mechanism in (FULL, other, chosen):
        spend(book, mechanism)
    assert [run.mechanism for run in book.runs()] == [FULL, other, chosen]
    assert book.runs()[0][1:4] == (1e-5, 1.0, "/runs/a")
    assert stat.S_IMODE(book.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(book.path.parent.stat().st_mode) == 0o700


def test_composition_is_that_of_one_mechanism_of_all_updates():
    """Full batches: four times 4 updates are 16."""
    once = Mechanism(sampling_prob=1.0, num_updates=16, noise_multiplier=8.0)
    expected = once.epsilon(1e-5)
    four = ledger.composed(spent(*[FULL] * 4), 1e-5)
    assert four == pytest.approx(expected, rel=1e-3)
    assert ledger.composed(spent(FULL), 1e-5) == FULL.epsilon(1e-5)
    assert ledger.composed([], 1e-5) == 0
    special = Mechanism(
        sampling_prob=1.0,
        num_updates=4,
        noise_multiplier=8.0,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )
    halves = [each.epsilon(5e-6) for each in (FULL, special)]
    assert ledger.composed(spent(FULL, special), 1e-5) == sum(halves)
    selection = Selection(distribution="geometric", expected_candidates=3)
    chosen = Mechanism(
        sampling_prob=1.0, num_updates=4, noise_multiplier=8.0, selection=selection
    )
    claim = chosen.epsilon(1e-5)
    both = ledger.composed(spent(FULL, chosen, epsilon=claim), 1e-5)
    assert chosen.epsilon(1e-5) < both < chosen.epsilon(1e-5) + FULL.epsilon(1e-5)


def test_selections_spend_on_validation_records_too():
    """At low orders choosing costs more than training, by the accountant itself."""
    selection = Selection(distribution="geometric", expected_candidates=10)
    chosen = Mechanism(
        sampling_prob=0.01, num_updates=3000, noise_multiplier=2.0, selection=selection
    )
    epsilon = chosen.epsilon(1e-5)
    relation = chosen.neighboring_relation
    noise = selection.score_noise(epsilon, 1e-5, relation)
    score = selection.event(dp_accounting.GaussianDpEvent(noise))
    for number in (1, 4):
        total = ledger.composed(spent(*[chosen] * number, epsilon=epsilon), 1e-5)
        for event in (chosen.event(), score):
            accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
            accountant.compose(event, number)
            assert accountant.get_epsilon(1e-5) <= total + 1e-9
        assert total < 1.1 * number * epsilon


@pytest.mark.proves("run.ledger.Ledger", 2)
def test_a_budget_is_not_exceeded(book):
    spend(book)
    one, two = FULL.epsilon(1e-5), ledger.composed(spent(FULL, FULL), 1e-5)
    book.declare((one + two) / 2, 1e-5)
    with pytest.raises(
        UserError, match=r"spent before it on these records that makes [\d.]+ at"
    ):
        spend(book)
    assert len(book.runs()) == 1
    book.declare(two, 1e-5)
    spend(book)
    assert len(book.runs()) == 2
    for wrong in (float("nan"), 0.0, float("inf")):
        with pytest.raises(UserError, match=r"--declare is .* positive and finite"):
            book.declare(wrong, 1e-5)
    with pytest.raises(UserError, match=r"privacy\.epsilon is 1: with what runs spent"):
        spend(book)
    assert f"2 runs: epsilon {round_up(two)} together, at delta" in book.table(0.5)


@pytest.mark.parametrize("change", ["edited", "removed", "cut", "exchanged"])
def test_a_line_that_was_changed_is_noticed(book, change):
    for epsilon in (1.0, 2.0, 3.0):
        spend(book, epsilon=epsilon)
    lines = book.path.read_text().splitlines()
    changed = {
        "edited": [lines[0].replace('"epsilon": 1.0', '"epsilon": 0.1'), *lines[1:]],
        "removed": [lines[0], lines[2]],
        "cut": [*lines[:2], lines[2][:-9]],
        "exchanged": [lines[1], lines[0], lines[2]],
    }[change]
    assert changed != lines
    book.path.write_text("\n".join(changed) + "\n")
    with pytest.raises(UserError, match=r"records\.jsonl is damaged at line"):
        spend(book)


def test_a_dataset_is_known_by_its_images():
    whole = toy.records(12)
    order = np.random.default_rng(0).permutation(12)

    def of(train, validation=None):
        return ledger.of(Dataset(train, toy.records(3, 9), validation)).path

    path = of(whole)
    assert of(whole.subset(order)) == path
    assert of(whole.subset(order[:8]), whole.subset(order[8:])) == path
    assert of(whole.subset(order[:8])) != path
    assert of(toy.records(12, seed=1)) != path


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    spend(ledger.Ledger(tmp_path / "file" / "records.jsonl"))
    assert "is not writable, so this run is in no ledger" in capsys.readouterr().err


@pytest.mark.proves("run.ledger.Ledger", 2)
def test_a_declared_budget_is_kept_where_nothing_can_be_written(book, monkeypatch):
    book.declare(0.1, 1e-5)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"not writable, and epsilon 0.1 is declared"):
        spend(book)


@pytest.mark.proves("run.ledger.Ledger", 1)
def test_a_run_is_in_the_ledger_once_and_refused_over_the_budget(tmp_path, monkeypatch):
    monkeypatch.setenv("DPMIX_JAX_LEDGER", str(tmp_path / "ledger"))
    assert runs.run(tmp_path / "first").status == 0
    assert runs.run(tmp_path / "first").status == 0  # it has finished: nothing new
    (path,) = (tmp_path / "ledger").glob("*.jsonl")
    assert len(path.read_text().splitlines()) == 1
    # A run that is refused, here for its lost secret, spends nothing.
    (tmp_path / "first/results.json").unlink()
    refused = runs.run(tmp_path / "first")
    assert (refused.status, "but no secret.json" in refused.err) == (2, True)
    assert len(path.read_text().splitlines()) == 1
    digits = f"--config={ROOT}/configs/digits.py"
    shown = call("experiments/budget.py", [digits, "--declare=0.6"])
    assert shown.returncode == 0, shown.stderr
    assert "(0.5, 1e-05)-DP" in shown.stdout
    assert "1 runs: epsilon 0.5 together, at delta 1e-05, of 0.6" in shown.stdout
    done = runs.run(tmp_path / "second")
    assert done.status == 2
    assert "privacy.epsilon is 0.5: with what runs spent before it" in done.err
    second = [p.name for p in (tmp_path / "second").iterdir() if p.name[0] != "."]
    assert not second
    assert json.loads(path.read_text().splitlines()[-1])["budget"]["epsilon"] == 0.6
