"""Private selection: what it spends, what it draws, and what it leaves."""

import dataclasses
import importlib.util
import json
import math
import signal
import subprocess
import sys
import types

import ml_collections
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
    dry_run,
    experiment,
    statement,
)
from dpmix_jax.command_line import load_experiment
from dpmix_jax.config import to_dict
from dpmix_jax.selection import SHAPES
from dpmix_jax.sweep import from_config_dict
from dpmix_jax.workdir import Workdir
from tests.conftest import ROOT

ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE
RATE, VALIDATION = "optimizer.learning_rate", 288
SMALL = {
    "title": "Tiny",
    "base": f"{ROOT}/configs/digits.py:8",
    "rows": (
        ("Slow", {"method.name": "dp_sgd", RATE: 1e-6}),
        ("Fast", {"method.name": "dp_sgd", RATE: 1.0}),
    ),
    "columns": {},
    "common": {
        "data": {"validation_size": VALIDATION},
        "model": {"features": "4,8", "groups": 2},
        "privacy": {
            "num_updates": 8,
            "selection": "geometric",
            "expected_candidates": 3.0,
        },
        "performance": {"microbatch_size": 256},
    },
    "seeds": 2,
    "metric": "nonprivate/validation/accuracy_ema",
}


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


@pytest.mark.proves("privacy.calibrate", 1)
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


def test_the_statement_covers_the_choice():
    config = PrivacyConfig(
        epsilon=2.0,
        expected_batch_size=256,
        num_updates=10,
        selection="poisson",
        expected_candidates=10.0,
    )
    mechanism = calibrate(
        epsilon=2.0,
        delta=1e-5,
        sampling_prob=0.1,
        num_updates=10,
        selection=config.private_selection,
    )
    facts = statement.privacy_report(
        config,
        mechanism,
        num_records=2560,
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
        "(2, 1e-05)-differentially private, tuning included, if `experiments/sweep.py`"
        " has selected this run.",
        "one training or validation record: an image",
        "two pairs of training and validation set are neighbours if",
        "Of no other candidate anything",
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


def test_the_score_is_the_noisy_count():
    confusion = np.array([[5, 1], [2, 30]])
    run = types.SimpleNamespace(
        pipeline=types.SimpleNamespace(all_params=lambda params: params),
        state=types.SimpleNamespace(ema_params="averaged"),
        config=types.SimpleNamespace(seed=None),
        confusions={
            "nonprivate/validation": lambda p: confusion if p == "averaged" else None
        },
    )
    scores = np.array([experiment._Run._score(run, 30.0) for _ in range(4000)])
    assert scores.dtype == int
    assert abs(scores.mean() - 35) < 5 * 30.0 / math.sqrt(len(scores))
    assert abs(scores.std() / 30.0 - 1) < 5 / math.sqrt(2 * len(scores))
    run.config.seed = 7
    assert experiment._Run._score(run, 3.0) == experiment._Run._score(run, 3.0)


def test_a_candidate_that_goes_on_is_accounted_for_as_before(tmp_path):
    config = load_experiment(grid().candidates()[0].flags).privacy
    began = experiment._mechanism(config, 0.1, Workdir(tmp_path))
    assert began.selection == config.private_selection
    Workdir(tmp_path).begin(None, data="", noise_multiplier=began.noise_multiplier)
    assert experiment._mechanism(config, 0.1, Workdir(tmp_path)) == began


def test_a_dry_run_calibrates_for_the_selection(monkeypatch):
    class AskedError(Exception):
        pass

    def calibrate(**options):
        assert options["selection"] == choose("geometric", 3.0)
        raise AskedError

    monkeypatch.setattr(dry_run.privacy, "calibrate", calibrate)
    with pytest.raises(AskedError):
        dry_run.dry_run(load_experiment(grid().candidates()[0].flags))


def test_a_choice_that_no_noise_makes_private_is_one_line():
    with pytest.raises(
        UserError, match=r"privacy.expected_candidates is 100: no noise"
    ):
        choose("poisson", 100.0).score_noise(1e-4, 1e-5, ADD_OR_REMOVE)
    enough = choose("geometric").score_noise(2000.0, 1e-5, ADD_OR_REMOVE)
    assert choose("geometric").score_epsilon(enough, 1e-5, ADD_OR_REMOVE) <= 2000


# All of them.


@pytest.fixture
def program():
    path = ROOT / "experiments/sweep.py"
    spec = importlib.util.spec_from_file_location("sweep_program", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in ("config", "workdir", "set"):
            delattr(module.flags.FLAGS, name)


def grid(**changes):
    return from_config_dict(ml_collections.ConfigDict({**SMALL, **changes}))


def draws(monkeypatch, drawn):
    """Selections draw these points."""
    monkeypatch.setattr(Selection, "draw", lambda self, points, rng: drawn)


def pretend(monkeypatch, program, scores, calls):
    """Runs finish at once, with these scores; None is a failure, -1 a signal."""

    def attempt(program, flags, workdir, *, cache, signals):
        calls.append((int(workdir.name), list(flags)))
        score = scores[int(workdir.name)]
        if score == -1:
            signals.append(signal.SIGTERM)
        elif score is None:
            return "exit status 1: it broke"
        else:
            workdir.mkdir()
            workdir.with_name(f"{workdir.name}.log").touch()
            cache.mkdir(exist_ok=True)
            folder = Workdir(workdir)
            folder.write_json("config.json", to_dict(load_experiment(flags)))
            folder.write("secret.json", "{}")  # as a kill may leave it
            folder.end(
                {
                    **dict.fromkeys(("test_accuracy", "test_accuracy_ema"), 0.5),
                    **{"epsilon": 2.0, "delta": 1e-5, "noise_multiplier": 1.0},
                    **{"seconds": 1.0, "score": score},
                }
            )
        return None

    monkeypatch.setattr(program, "attempt", attempt)


def select(program, folder, signals=None, **changes):
    job = program.make_job(grid(**changes), Workdir(folder))
    folder.mkdir(exist_ok=True)
    return job.run([] if signals is None else signals)


def test_the_best_score_is_kept_and_nothing_else(
    program, monkeypatch, tmp_path, capsys
):
    folder, calls, scores = tmp_path / "out", [], [30, 95, None, 40]
    draws(monkeypatch, [1, 0, 0, 1])
    pretend(monkeypatch, program, scores, calls)
    assert select(program, folder) == 1  # without candidate 3 there is no selection
    assert not (folder / "selected").exists()
    assert (folder / "candidates").stat().st_mode & 0o777 == 0o700
    assert "failed: candidate 3: exit status 1: it broke" in capsys.readouterr().err
    scores[2] = -1
    assert select(program, folder, caught := []) == 128 + signal.SIGTERM
    assert caught
    scores[2] = 90
    assert select(program, folder) == 0
    assert [n for n, _ in calls] == [0, 1, 2, 2, 2, 3]  # the finished are not repeated
    rates = [f"--config.{RATE}={rate}" for rate in (1.0, 1e-6, 1e-6, 1.0)]
    taken = dict(calls)
    assert [rate in taken[n] for n, rate in enumerate(rates)] == [True] * 4
    assert not any("seed" in flag for flags in taken.values() for flag in flags)
    assert [path.name for path in folder.iterdir()] == ["selected"]
    assert {path.name for path in (folder / "selected").iterdir()} == {
        "config.json",
        "results.json",
    }
    assert Workdir(folder / "selected").results()["score"] == 95
    assert capsys.readouterr().out.startswith("test accuracy raw")
    assert select(program, folder) == 0
    assert len(calls) == 6
    common = {**SMALL["common"], "optimizer": {"momentum": 0.5}}
    with pytest.raises(UserError, match="holds a selection among other settings"):
        select(program, folder, common=common)


def test_killed_after_the_choice_it_only_cleans_up(program, monkeypatch, tmp_path):
    folder = tmp_path / "out"
    draws(monkeypatch, [0, 1])
    pretend(monkeypatch, program, [10, 20], [])
    rename = program.pathlib.Path.rename

    def killed(path, target):
        rename(path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(program.pathlib.Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        select(program, folder)
    assert (folder / "plan.json").exists()
    monkeypatch.setattr(program.pathlib.Path, "rename", rename)
    assert select(program, folder) == 0
    assert [path.name for path in folder.iterdir()] == ["selected"]
    assert Workdir(folder / "selected").results()["score"] == 20


def test_none_drawn_is_none_released(program, monkeypatch, tmp_path, capsys):
    draws(monkeypatch, [])
    pretend(monkeypatch, program, [], calls := [])
    for _ in range(2):
        assert select(program, tmp_path / "out") == 1
        assert "nothing is released" in capsys.readouterr().err
        draws(monkeypatch, [0])  # it is not drawn again
    assert calls == []


def test_the_plan_is_drawn_once_and_is_secret(program, monkeypatch, tmp_path):
    folder = tmp_path / "out"
    pretend(monkeypatch, program, [None] * 100, [])
    assert select(program, folder) == 1
    path = folder / "plan.json"
    drawn = json.loads(path.read_text())["drawn"]
    assert drawn
    assert set(drawn) <= {0, 1}
    assert path.stat().st_mode & 0o777 == 0o600
    draws(monkeypatch, [])
    assert select(program, folder) == 1
    assert json.loads(path.read_text())["drawn"] == drawn


def test_a_selection_goes_on_with_what_it_began_with(program, monkeypatch, tmp_path):
    """Neither other settings behind the same flags, nor other data, nor other runs."""
    folder = tmp_path / "out"
    draws(monkeypatch, [0, 1])
    pretend(monkeypatch, program, [10, None], [])
    assert select(program, folder) == 1
    with pytest.raises(UserError, match="began with other settings or data"):
        select(program, folder, rows=SMALL["rows"][:1])
    load = program.data.load

    def other(config):
        dataset = load(config)
        validation = dataset.validation
        labels = validation.labels[::-1]
        return dataset._replace(
            validation=dataclasses.replace(validation, labels=labels)
        )

    monkeypatch.setattr(program.data, "load", other)
    with pytest.raises(UserError, match="began with other settings or data"):
        select(program, folder)
    monkeypatch.setattr(program.data, "load", load)
    weights = tmp_path / "weights"
    weights.write_text("one")
    file = {**SMALL["common"], "finetune": {"weights": str(weights)}}
    assert select(program, tmp_path / "file", common=file) == 1
    weights.write_text("another")
    with pytest.raises(UserError, match="began with other settings or data"):
        select(program, tmp_path / "file", common=file)
    # What changes nothing but speed may change, as after running out of memory.
    slower = {**SMALL["common"], "performance": {"microbatch_size": 8}}
    assert select(program, folder, common=slower) == 1
    first = Workdir(folder / "candidates/0")
    config = json.loads((first.path / "config.json").read_text())
    config["privacy"]["epsilon"] = 1000.0
    first.write_json("config.json", config)
    with pytest.raises(UserError, match=r"privacy.epsilon \(1000.0 there, 8.0 here\)"):
        select(program, folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes.txt: use a new or empty"):
        select(program, tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"privacy.num_updates": 9}, "privacy.num_updates (160 there, 9 here)"),
        ({"privacy.epsilon": 3.0}, "privacy.epsilon (8.0 there, 3.0 here)"),
        ({"data.half": 1}, "data.half (0 there, 1 here)"),
        ({"seed": 3}, "seed is 3: it must be None for privacy.selection"),
        (
            {"method.name": "dp_mix_diff", "public.name": "rendered_digits"},
            "public.name (None there, rendered_digits here)",
        ),
        (
            {"finetune.weights": "model.safetensors"},
            "finetune.weights (None there, model.safetensors here)",
        ),
        (
            {"performance.clipping": "ghost"},
            "performance.clipping (instantiate there, ghost here)",
        ),
        ({"performance.microbatch_size": 8}, None),
        ({"method.name": "microbatch_mixup"}, None),
        ({"privacy.l2_clip_norm": 0.5}, None),
        ({"method.name": "dp_mix_self"}, None),
    ],
)
def test_candidates_differ_in_nothing_the_accountant_sees(
    program, tmp_path, settings, message
):
    common = {"data": SMALL["common"]["data"]}
    privacy = {"selection": "geometric", "expected_candidates": 3.0}
    rows = (("First", {}), ("Second", settings))
    changes = {"rows": rows, "common": {**common, "privacy": privacy}}
    if message is None:
        program.make_job(grid(**changes), Workdir(tmp_path))
        return
    if "seed" in settings:  # a sweep sets seeds itself
        changes["rows"] = rows[:1]
        changes["base"] = f"{tmp_path}/seeded.py"
        (tmp_path / "seeded.py").write_text(
            f"import runpy\n\ndef get_config():\n"
            f"    file = runpy.run_path('{ROOT}/configs/digits.py')\n"
            f"    config = file['get_config']()\n    config.seed = 3\n"
            f"    return config\n"
        )
    with pytest.raises(UserError) as error:
        program.make_job(grid(**changes), Workdir(tmp_path))
    assert message in str(error.value)


def test_one_cell_with_a_selection_makes_it_one(program, tmp_path):
    """Not a sweep whose runs with known seeds would claim to cover their choice."""
    chosen = {"privacy.selection": "geometric", "privacy.expected_candidates": 3.0}
    for rows in ((("A", {}), ("B", chosen)), (("B", chosen), ("A", {}))):
        common = {"data": SMALL["common"]["data"]}
        with pytest.raises(UserError, match=r"privacy.selection: candidates must not"):
            program.make_job(grid(rows=rows, common=common), Workdir(tmp_path))


def test_a_selection_runs_from_the_command_line(program, monkeypatch, tmp_path):
    """One candidate, as a selection would go on with it that was killed."""
    path = tmp_path / "grid.py"
    path.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({SMALL!r})\n"
    )
    folder = tmp_path / "out"
    draws(monkeypatch, [1])
    pretend(monkeypatch, program, [None], [])
    assert select(program, folder) == 1
    done = subprocess.run(
        [
            *(sys.executable, f"{ROOT}/experiments/sweep.py"),
            *(f"--config={path}", f"--workdir={folder}"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "nonprivate candidate 1/1; ETA 0:00:00" in done.stderr
    assert done.stdout.startswith("test accuracy raw")
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"selected"}
    selected = folder / "selected"
    facts = json.loads((selected / "privacy.json").read_text())
    results = json.loads((selected / "results.json").read_text())
    last = Workdir(selected).metrics()[-1]
    assert results["epsilon"] == facts["epsilon"] <= 8.0
    assert last["epsilon"] == facts["epsilon_rdp"]
    assert facts["secret_seed"]
    correct = last["nonprivate/validation/accuracy_ema"] * VALIDATION
    noise = facts["selection"]["score_noise"]
    assert abs(results["score"] - correct) < 6 * noise + 1
    text = (selected / "PRIVACY.md").read_text()
    assert "(8, 1e-05)-differentially private, tuning included, if" in text
    for name in ("results.json", "privacy.json", "report.html"):
        assert "validation/accuracy" not in (selected / name).read_text()
