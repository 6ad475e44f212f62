"""Private selections of a sweep's grid: which candidates run, and what is left.

But for the last test runs are pretended: they write what a run writes.
"""

import dataclasses
import json
import pathlib
import shutil
import signal

import ml_collections
import pytest

from dpmix_jax import Selection, UserError, data, sweeps
from dpmix_jax.run import experiment, ledger, plan
from dpmix_jax.run.config import to_dict
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sweeps.grid import METRICS
from tests.conftest import ROOT

RATE, VALIDATION = "optimizer.learning_rate", 288
CHOSEN = {"selection": "geometric", "expected_candidates": 3.0}
SMALL = {
    "title": "Tiny",
    "base": f"{ROOT}/configs/digits.py:8",
    "rows": (("Slow", {RATE: 1e-6}), ("Fast", {RATE: 1.0})),
    "common": {
        "data": {"validation_size": VALIDATION},
        "method": {"name": "dp_sgd", "k_base": 0, "k_self": 0},
        "model": {"features": "4,8", "groups": 2},
        "privacy": {"num_updates": 8, **CHOSEN},
        "performance": {"microbatch_size": 256},
    },
    "seeds": 2,
    "metric": "nonprivate/validation/accuracy_ema",
}


def launch(path, run_one, **changes):
    values = ml_collections.ConfigDict({**SMALL, **changes})
    return sweeps.launch(sweeps.from_config_dict(values), path, run_one)


def common(group, **settings):
    """The common settings with some of a group changed."""
    found = SMALL["common"]
    return {"common": {**found, group: {**found.get(group, {}), **settings}}}


@pytest.fixture
def draws(monkeypatch):
    """Selections draw these points."""
    return lambda *drawn: monkeypatch.setattr(
        Selection, "draw", lambda self, points, rng: list(drawn)
    )


def pretend(scores, calls=None):
    """Runs end at once with these scores; None is a failure, -1 a signal."""

    def run_one(config, workdir, signals):
        number = int(workdir.path.name)
        if calls is not None:
            calls.append((number, config))
        score = scores[number]
        if score == -1:
            signals.append(signal.SIGTERM)
        elif score is None:
            return "exit status 1: it broke"
        else:
            workdir.path.mkdir()
            workdir.path.with_name(f"{number}.log").touch()
            (workdir.path.parent.parent / ".jax_cache").mkdir(exist_ok=True)
            workdir.write_json("config.json", to_dict(config))
            workdir.write("secret.json", "{}")  # as a kill may leave it
            results = {"epsilon": 2.0, "delta": 1e-5, "noise_multiplier": 1.0}
            results |= {"test_accuracy": 0.5, "test_accuracy_ema": 0.5, "seconds": 1.0}
            workdir.write_json("results.json", {**results, "score": score})
        return None

    return run_one


def left(path):
    return {file.name for file in path.iterdir()} - {".lock"}


def test_the_best_score_is_kept_and_nothing_else(draws, tmp_path, capsys):
    path, calls, scores = tmp_path / "out", [], [30, 95, None, 40]
    draws(1, 0, 0, 1)
    run_one = pretend(scores, calls)
    assert launch(path, run_one) == 1  # without candidate 3 there is no selection
    assert not (path / "selected").exists()
    assert (path / "candidates").stat().st_mode & 0o777 == 0o700
    assert "failed: candidate 3: exit status 1: it broke" in capsys.readouterr().err
    scores[2] = -1
    assert launch(path, run_one) == 128 + signal.SIGTERM
    scores[2] = 90
    assert launch(path, run_one) == 0
    assert [n for n, _ in calls] == [0, 1, 2, 2, 2, 3]  # the finished are not repeated
    taken = dict(calls).values()
    assert [c.optimizer.learning_rate for c in taken] == [1.0, 1e-6, 1e-6, 1.0]
    assert {config.seed for config in taken} == {None}
    assert left(path) == {"selected"}
    assert left(path / "selected") == {"config.json", "results.json"}
    assert Workdir(path / "selected").results()["score"] == 95
    assert capsys.readouterr().out.startswith("test accuracy raw")
    assert launch(path, run_one) == 0
    assert len(calls) == 6
    with pytest.raises(UserError, match="holds a selection among other settings"):
        launch(path, run_one, **common("optimizer", momentum=0.5))


def test_killed_after_the_choice_it_only_cleans_up(draws, monkeypatch, tmp_path):
    draws(0, 1)
    rename = pathlib.Path.rename

    def killed(path, target):
        rename(path, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            launch(tmp_path, pretend([10, 20]))
    assert left(tmp_path) > {"plan.json", "candidates", "selected"}
    assert launch(tmp_path, pretend([])) == 0
    assert left(tmp_path) == {"selected"}
    assert Workdir(tmp_path / "selected").results()["score"] == 20


def train(config, workdir, signals):
    assert experiment.run(config, workdir) == 0


@pytest.fixture
def book(monkeypatch, tmp_path):
    """The ledger of the records of these selections, with room for one of them."""
    monkeypatch.setenv("DPMIX_JAX_LEDGER", str(tmp_path / "ledger"))
    config = data.DataConfig(name="digits", validation_size=VALIDATION)
    found = ledger.of(data.load(config))
    found.declare(8.0, 1e-5)
    return found


def test_a_selection_is_one_line_of_the_ledger(draws, book, tmp_path):
    """Each candidate would otherwise spend what all of them do, and be refused."""
    draws(1, 0)
    assert launch(tmp_path / "out", train) == 0
    (run,) = book.runs()
    assert run.workdir == str(tmp_path / "out")
    with pytest.raises(UserError, match="with what runs spent before it"):
        launch(tmp_path / "again", train)


@pytest.mark.proves("run.ledger.Ledger", 1)
@pytest.mark.sampled("another copy", "begun")
@pytest.mark.parametrize(
    ("folder", "changes"),
    [
        pytest.param("alone", {}, id="alone"),
        pytest.param("out/candidates/99", {}, id="not drawn"),
        pytest.param("out/elsewhere/1", {}, id="elsewhere"),
        pytest.param("copy/candidates/1", {}, id="another copy"),
        pytest.param("out/candidates/0", {}, id="begun"),  # and deleted
        pytest.param("out/candidates/1", {"filter_gain": 0.25}, id="other settings"),
    ],
)
def test_a_candidate_that_no_selection_has_paid_for_pays(
    draws, book, tmp_path, folder, changes
):
    """Whatever lies beside it, it is refused as a selection of its own."""

    def first(config, workdir, signals):
        number = int(workdir.path.name)
        if number == 0:
            train(config, workdir, signals)
            shutil.rmtree(workdir.path)
            return None
        return "it is the next one's turn"

    draws(1, 0)
    assert launch(tmp_path / "out", first) == 1
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    (run,) = book.runs()
    points = sweeps.from_config_dict(ml_collections.ConfigDict(SMALL)).candidates()
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["begun"] == [0]
    config = points[plan["drawn"][int(folder.endswith("1"))]].config
    optimizer = dataclasses.replace(config.optimizer, **changes)
    config = dataclasses.replace(config, optimizer=optimizer)
    with pytest.raises(UserError, match="with what runs spent before it"):
        experiment.run(config, Workdir(tmp_path / folder))
    assert book.runs() == [run]


@pytest.mark.parametrize("text", ["[]", "{", '{"points": [], "drawn": [3]}'])
def test_what_is_no_plan_exempts_nobody(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    points = sweeps.from_config_dict(ml_collections.ConfigDict(SMALL)).candidates()
    assert not plan.claims(points[0].config, tmp_path / "candidates" / "0")
    assert (tmp_path / "plan.json").read_text() == text


def test_a_plan_of_an_earlier_version_pays(draws, book, tmp_path):
    draws(0, 1)
    assert launch(tmp_path / "out", pretend([None] * 2)) == 1
    path = tmp_path / "out/plan.json"
    plan = json.loads(path.read_text())
    del plan["folder"]
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match="with what runs spent before it"):
        launch(tmp_path / "out", train)
    assert json.loads(path.read_text()) == plan
    book.declare(100.0, 1e-5)
    assert launch(tmp_path / "out", train) == 0
    assert len(book.runs()) == 2


def test_what_candidates_would_be_refused_for_spends_nothing(book, tmp_path):
    with pytest.raises(UserError, match="max_shift is 9"):
        launch(tmp_path / "out", train, **common("augmentation", max_shift=9))
    assert book.runs() == []


def test_a_setting_that_came_later_has_its_default(draws, tmp_path):
    draws(0, 1)
    assert launch(tmp_path, pretend([10, None])) == 1
    plan = json.loads((tmp_path / "plan.json").read_text())
    for point in plan["points"]:
        del point["optimizer"]["filter_gain"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert launch(tmp_path, pretend([None, 20])) == 0  # it had not begun
    path = tmp_path / "selected/config.json"
    config = json.loads(path.read_text())
    del config["optimizer"]["filter_gain"]
    path.write_text(json.dumps(config))
    assert launch(tmp_path, pretend([])) == 0


def test_none_drawn_is_none_released(draws, tmp_path, capsys):
    draws()
    for _ in range(2):
        assert launch(tmp_path, pretend([])) == 1
        assert "nothing is released" in capsys.readouterr().err
        draws(0)  # it is not drawn again


def test_the_plan_is_drawn_once_and_is_secret(draws, tmp_path):
    assert launch(tmp_path, pretend([None] * 100)) == 1
    path = tmp_path / "plan.json"
    plan = path.read_text()
    assert {*json.loads(plan)["drawn"]} in ({0}, {1}, {0, 1})
    assert path.stat().st_mode & 0o777 == 0o600
    draws()
    assert launch(tmp_path, pretend([None] * 100)) == 1
    assert path.read_text() == plan


def test_a_selection_goes_on_with_what_it_began_with(draws, monkeypatch, tmp_path):
    """Neither other settings behind the same flags, nor other data, nor other runs."""
    path, run_one = tmp_path / "out", pretend([10, None])
    draws(0, 1)
    assert launch(path, run_one) == 1
    with pytest.raises(UserError, match="began with other settings or data"):
        launch(path, run_one, rows=SMALL["rows"][:1])
    load = data.load

    def other(config):
        dataset = load(config)
        labels = dataset.validation.labels[::-1]
        validation = dataclasses.replace(dataset.validation, labels=labels)
        return dataset._replace(validation=validation)

    with monkeypatch.context() as patch:
        patch.setattr(data, "load", other)
        with pytest.raises(UserError, match="began with other settings or data"):
            launch(path, run_one)
    weights = tmp_path / "weights"
    weights.write_text("one")
    file = common("finetune", weights=str(weights))
    assert launch(tmp_path / "file", run_one, **file) == 1
    weights.write_text("another")
    with pytest.raises(UserError, match="began with other settings or data"):
        launch(tmp_path / "file", run_one, **file)
    # What changes nothing but speed may change, as after running out of memory.
    assert launch(path, run_one, **common("performance", microbatch_size=8)) == 1
    first = path / "candidates/0/config.json"
    config = json.loads(first.read_text())
    config["privacy"]["epsilon"] = 1000.0
    first.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"privacy.epsilon \(1000.0 there, 8.0 here\)"):
        launch(path, run_one)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes.txt: use a new or empty"):
        launch(tmp_path / "other", run_one)


ONE = {"data": {"validation_size": VALIDATION}}
DIFF = {"method.name": "dp_mix_diff", "public.name": "rendered_digits"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"privacy.num_updates": 9}, "privacy.num_updates (160 there, 9 here)"),
        ({"privacy.epsilon": 3.0}, "privacy.epsilon (8.0 there, 3.0 here)"),
        ({"data.half": 1}, "data.half (0 there, 1 here)"),
        (DIFF, "public.name (None there, rendered_digits here)"),
        ({"finetune.weights": "a"}, "finetune.weights (None there, a here)"),
        ({"performance.clipping": "ghost"}, "(auto there, ghost here)"),
        ({"performance.microbatch_size": 8}, None),
        ({"method.name": "microbatch_mixup", "method.k_self": 0}, None),
        ({"privacy.l2_clip_norm": 0.5}, None),
        ({"optimizer.momentum": 0.5}, None),
    ],
)
def test_candidates_differ_in_nothing_the_accountant_sees(
    draws, tmp_path, settings, message
):
    draws()
    changes = {
        "rows": (("First", {}), ("Second", settings)),
        "common": {**ONE, "privacy": CHOSEN},
    }
    if message is None:
        assert launch(tmp_path, pretend([]), **changes) == 1  # none was drawn
        return
    with pytest.raises(UserError) as error:
        launch(tmp_path, pretend([]), **changes)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_candidates_have_secret_seeds(tmp_path):
    base = tmp_path / "seeded.py"
    base.write_text(
        "from configs import digits\n\n\ndef get_config():\n"
        "    config = digits.get_config()\n    config.seed = 3\n    return config\n"
    )
    with pytest.raises(UserError, match="seed is 3: it must be None for priv"):
        launch(tmp_path / "out", pretend([]), base=str(base))


def test_one_cell_with_a_selection_makes_it_one(tmp_path):
    """Not a sweep whose runs with known seeds would claim to cover their choice."""
    chosen = {f"privacy.{key}": value for key, value in CHOSEN.items()}
    for rows in ((("A", {}), ("B", chosen)), (("B", chosen), ("A", {}))):
        with pytest.raises(UserError, match=r"privacy.selection: candidates must not"):
            launch(tmp_path, pretend([]), rows=rows, common=ONE)


@pytest.mark.sampled
def test_the_selected_run_is_covered_and_measures_all_metrics(draws, tmp_path, capsys):
    def run_one(config, workdir, signals):
        assert experiment.run(config, workdir) == 0

    draws(1)
    assert launch(tmp_path, run_one) == 0
    printed = capsys.readouterr()
    assert "nonprivate candidate 1/1; ETA 0:00:00" in printed.err
    assert printed.out.splitlines()[-1].startswith("test accuracy raw")
    assert left(tmp_path) == {"selected"}
    selected = tmp_path / "selected"
    facts = json.loads((selected / "privacy.json").read_text())
    results, last = Workdir(selected).results(), Workdir(selected).metrics()[-1]
    asked_for = {m for m in METRICS if "views" in m or "gradient" in m}
    assert {*METRICS} - asked_for <= {*results, *last}
    assert results["epsilon"] == facts["epsilon"] <= 8.0
    assert last["epsilon"] == pytest.approx(facts["epsilon_rdp"], rel=1e-8)
    assert facts["secret_seed"]
    correct = last["nonprivate/validation/accuracy_ema"] * VALIDATION
    noise = facts["selection"]["score_noise"]
    assert abs(results["score"] - correct) < 6 * noise + 1
    text = (selected / "PRIVACY.md").read_text()
    assert "(8, 1e-05)-differentially private, tuning included, if" in text
    for name in ("results.json", "privacy.json", "report.html"):
        assert "validation/accuracy" not in (selected / name).read_text()
    page = (selected / "report.html").read_text()
    assert "Confusion matrix of 360 test images" in page  # not of validation records
