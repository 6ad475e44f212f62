"""Sweeps: which runs there are, and that they survive.

Most runs here are pretended: they write what a run writes. Real ones, in processes
that are killed, are in the slow test at the end.
"""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import ml_collections
import numpy as np
import pytest

from dpmix_jax import UserError, sweeps
from dpmix_jax.run import experiment
from dpmix_jax.run.config import to_dict
from dpmix_jax.run.workdir import Workdir
from tests.conftest import ROOT
from tests.programs import call

ROWS = (
    ("DP-SGD", {"method.name": "dp_sgd"}),
    ("K = 1, half", {"method.name": "dp_sgd", "optimizer": {"learning_rate": 0.5}}),
)
SMALL = {
    "title": "Tiny",
    "base": f"{ROOT}/configs/digits.py:{{epsilon}}",
    "rows": ROWS,
    "columns": {"epsilon": ("3",)},
    "common": {
        "method": {"k_base": 0, "k_self": 0},
        "model": {"features": "4,8", "groups": 2},
        "privacy": {"num_updates": 3},
        "performance": {"microbatch_size": 256},
    },
    "seeds": 2,
    "metric": "test_accuracy_ema",
    "paper": {"source": "A paper.", "cells": (("DP-SGD", "3", "50.0 (.1)"),)},
}
VALIDATED = "nonprivate/validation/accuracy_ema"


def config(*settings, **changes):
    values = ml_collections.ConfigDict({**SMALL, **changes})
    return sweeps.from_config_dict(values, settings)


# The grid.


def test_runs_go_seed_by_seed():
    grid = config(columns={"epsilon": ("1", "8"), "optimizer": {"momentum": (0.5, 0)}})
    runs = grid.runs()
    assert len(runs) == 2 * 4 * 2
    assert [run.seed for run in runs] == [0] * 8 + [1] * 8
    assert [run.row for run in runs[:8]] == ["DP-SGD"] * 4 + ["K = 1, half"] * 4
    assert [run.point for run in runs[:3]] == [("1", 0.5), ("1", 0), ("8", 0.5)]
    last = runs[-1]
    folder = "k-1-half/epsilon=8-optimizer.momentum=0/seed=1"
    assert last.folder == pathlib.Path(folder)
    assert last.name == "K = 1, half, epsilon = 8, optimizer.momentum = 0, seed 1"
    assert last.flags == (
        f"--config={ROOT}/configs/digits.py:8",
        "--config.method.k_base=0",
        "--config.method.k_self=0",
        "--config.model.features=4,8",
        "--config.model.groups=2",
        "--config.performance.microbatch_size=256",
        "--config.privacy.num_updates=3",
        "--config.method.name=dp_sgd",
        "--config.optimizer.learning_rate=0.5",
        "--config.optimizer.momentum=0",
        "--config.seed=1",
    )
    assert (last.config.seed, last.config.privacy.epsilon) == (1, 8.0)
    assert last.config.model.options["features"] == (4, 8)


def test_some_cells_have_settings_of_their_own():
    where = (
        ({"epsilon": "8"}, {"privacy.expected_batch_size": 64}),
        ({"row": "DP-SGD", "epsilon": "1"}, {"optimizer": {"learning_rate": 2.0}}),
    )
    grid = config(where=where, columns={"epsilon": ("1", "8")}, seeds=1)
    built = [run.config for run in grid.runs()]
    assert [c.privacy.expected_batch_size for c in built] == [256, 64, 256, 64]
    assert [c.optimizer.learning_rate for c in built] == [2.0, 1.0, 0.5, 0.5]


def test_columns_may_be_none_and_set_comes_before_common():
    base = f"{ROOT}/configs/digits.py"
    grid = config("privacy.num_updates=7", base=base, columns={}, seeds=1, paper=None)
    folders = [str(run.folder) for run in grid.runs()]
    assert folders == ["dp-sgd/seed=0", "k-1-half/seed=0"]
    assert [run.config.privacy.num_updates for run in grid.runs()] == [7, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": 3}, "unknown key sedes: did you mean seeds?"),
        ({"seeds": 0}, "seeds is 0: it must be at least 1"),
        ({"seeds": "2"}, "seeds is '2': it must be of type int"),
        ({"metric": "foo"}, "metric is 'foo': it must be one of test_accuracy, test_a"),
        ({"rows": ()}, "rows is empty"),
        ({"rows": {"a": {}}}, "rows is {'a': {}}: it must be of type tuple"),
        ({"rows": (("a",),)}, "rows has ('a',): it must be a str and a dict"),
        ({"where": ({},)}, "where has {}: it must be a dict and a dict"),
        ({"where": (({"row": "A"}, {}),)}, "where.row is 'A': it must be one of DP-SG"),
        ({"where": (({"rows": "A"}, {}),)}, "unknown key where.rows: did you mean whe"),
        ({"where": (({}, {"method.name": "a"}),)}, "rows.DP-SGD: method.name is set t"),
        ({"baseline": "A"}, "baseline is 'A': it must be one of None, DP-SGD, K = 1,"),
        ({"rows": (("a", {}), ("a", {}))}, "rows has 'a' twice"),
        ({"rows": (("a b", {}), ("a-b", {}))}, "rows or columns share the folder a-b/"),
        ({"columns": {"epsilon": "3"}}, "columns.epsilon is '3': it must be a list"),
        ({"base": "a.py:{delta}"}, "base is a.py:{delta}: delta is none of the colu"),
        ({"common": {"method": {"name": "dp_sgd"}}}, "rows.DP-SGD: method.name is set"),
        ({"rows": (("a", {"seed": 3}),)}, "rows.a: seed is set twice"),
        ({"columns": {"epsilon": ("1",), "seed": (3,)}}, "rows.DP-SGD: seed is set"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(UserError) as error:
        config(**changes)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_refuses_what_is_missing_or_no_setting():
    values = {key: value for key, value in SMALL.items() if key != "metric"}
    with pytest.raises(UserError, match="metric is missing from the config"):
        sweeps.from_config_dict(ml_collections.ConfigDict(values))
    with pytest.raises(UserError, match="--set is seed: it must be <key>=<value>"):
        config("seed")


# Whole sweeps, of runs that are pretended.


def pretend(calls, outcomes=()):
    """Returns what does a run, notes its folder, and measures a number of its own.

    Args:
      calls: receives the folders, in order.
      outcomes: by number of the call, a message that it fails with or a signal.
    """

    def run_one(config, workdir, signals):
        calls.append(str(workdir.path))
        outcome = dict(outcomes).get(len(calls))
        if isinstance(outcome, signal.Signals):
            os.kill(os.getpid(), outcome)
            while not signals:
                time.sleep(0.001)
        elif outcome is not None:
            return outcome
        else:
            finish(workdir, config)
        return None

    return run_one


def finish(workdir, config):
    workdir.path.mkdir(parents=True)
    value = round((config.seed + 1) / 10 + config.optimizer.learning_rate / 100, 3)
    workdir.write_json("config.json", to_dict(config))
    workdir.add_metrics({"step": 3, "epsilon": 3.0, VALIDATED: value, "seconds": 1.0})
    results = {"test_accuracy": 0.5, "test_accuracy_ema": value, "epsilon": 2.9}
    results |= {"device": "1 x cpu", "jax": "0.10", "confusion_ema": [[1]]}
    workdir.write_json("results.json", results)


def launch(path, run_one, *settings, **changes):
    return sweeps.launch(config(*settings, **changes), path, run_one)


def read_csv(path):
    return list(csv.DictReader((path / "runs.csv").read_text().splitlines()))


def content(path):
    return {name: (path / name).read_text() for name in ("runs.csv", "table.md")}


def test_what_a_sweep_writes_and_prints(tmp_path, capsys):
    path, calls = tmp_path / "sweep", []
    assert launch(path, pretend(calls)) == 0
    assert len(calls) == 4
    printed = capsys.readouterr()
    table = (path / "table.md").read_text()
    assert printed.out == table
    assert "| DP-SGD | 16.00 (7.07) | 50.0 (.1) |" in table
    said = printed.err.splitlines()
    assert said[0] == f"4 runs into {path}, 0 of them finished before"
    first = "run 1/4  DP-SGD, epsilon = 3, seed 0: test_accuracy_ema 11.00 %, 0 s; ETA"
    assert said[1] == f"{first} 0:00:00"
    assert len(said) == 5
    lines = read_csv(path)
    assert [line["row"] for line in lines] == ["DP-SGD", "K = 1, half"] * 2
    assert lines[3] == {
        **{"row": "K = 1, half", "epsilon": "3", "seed": "1", "step": "3"},
        **{"measured_epsilon": "2.9", VALIDATED: "0.205", "seconds": "1.0"},
        **{"test_accuracy": "0.5", "test_accuracy_ema": "0.205"},
        **{"device": "1 x cpu", "jax": "0.10"},
        "workdir": "k-1-half/epsilon=3/seed=1",
    }
    assert not (path / "choice.json").exists()
    assert launch(path, pretend(calls)) == 0
    assert len(calls) == 4  # finished runs are not repeated
    again = capsys.readouterr()
    assert again.out == table
    assert again.err == f"4 runs into {path}, 4 of them finished before\n"


def test_a_sweep_on_validation_records_writes_its_choice(tmp_path):
    rates = {"epsilon": ("3",), "optimizer": {"learning_rate": (1.0, 2.0)}}
    changes = {"metric": VALIDATED, "columns": rates, "rows": ROWS[:1], "paper": None}
    views = changes | {"metric": "test_accuracy_ema_views"}
    unseen = changes | {"metric": "nonprivate/gradient_stddev"}
    for found, message in (
        (changes, "data.validation"),
        (views, "evaluate.views is 1"),
        (unseen, "diagnostics.gradients is False"),
    ):
        with pytest.raises(UserError, match=message):
            launch(tmp_path / "none", pretend([]), **found)
    path, setting = tmp_path / "sweep", "data.validation_size=9"
    assert launch(path, pretend([], {3: "it broke"}), setting, **changes) == 1
    assert not (path / "choice.json").exists()
    assert launch(path, pretend([]), setting, **changes) == 0
    assert (path / "choice.json").stat().st_mode & 0o777 == 0o600  # of private records
    written = json.loads((path / "choice.json").read_text())
    assert written["choices"][0]["settings"]["optimizer.learning_rate"] == 2.0
    assert "no epsilon covers it" in written["privacy"]
    # Test accuracies play no part in a choice.
    assert "test_accuracy" not in (path / "runs.csv").read_text()


def test_a_stopped_sweep_goes_on_and_gives_the_same_table(tmp_path, capsys):
    whole, path, calls = tmp_path / "whole", tmp_path / "sweep", []
    assert launch(whole, pretend([])) == 0
    assert launch(path, pretend(calls, {2: signal.SIGTERM})) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith(
        "stopped: the same command goes on from there\n"
    )
    assert launch(path, pretend(calls)) == 0
    assert calls[1] == calls[2]
    assert len(calls) == 5
    assert content(path) == content(whole)


def test_a_failed_run_does_not_stop_the_rest(tmp_path, capsys):
    path, calls = tmp_path / "sweep", []
    assert launch(path, pretend(calls, {1: "it broke"})) == 1
    printed = capsys.readouterr()
    said = printed.err.splitlines()
    name = "DP-SGD, epsilon = 3, seed 0"
    assert said[1].startswith(f"run 1/4  {name}: FAILED: it broke; ETA ")
    assert said[2].startswith("run 2/4  K = 1, half, epsilon = 3, seed 0: test_")
    assert said[5:] == [f"failed: {name}: it broke"]
    assert "**3 of 4 runs have finished.**" in printed.out
    assert launch(path, pretend(calls)) == 0
    assert calls[4:] == calls[:1]  # the same command tries that one again


def test_runs_of_other_settings_are_failures(tmp_path, capsys):
    """They are neither overwritten nor taken for what they are not."""
    path, calls = tmp_path / "sweep", []
    assert launch(path, pretend(calls), seeds=1) == 0
    before = content(path)
    capsys.readouterr()
    assert launch(path, pretend(calls), "privacy.num_updates=4", seeds=1) == 1
    assert len(calls) == 2
    printed = capsys.readouterr()
    failed = [line for line in printed.err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2
    assert "is of another experiment" in failed[0]
    assert "privacy.num_updates (3 there, 4 here)" in failed[0]
    assert "**0 of 2 runs have finished.**" in printed.out
    assert launch(path, pretend(calls), seeds=1) == 0
    assert content(path) == before


def test_damaged_results_cost_one_run(tmp_path, capsys):
    path, calls = tmp_path / "sweep", []
    assert launch(path, pretend(calls), seeds=1) == 0
    (path / "dp-sgd/epsilon=3/seed=0/results.json").write_text("{")
    assert launch(path, pretend(calls), seeds=2) == 1
    assert len(calls) == 4
    assert capsys.readouterr().err.count("failed: ") == 1


def test_finished_runs_that_lack_the_metric_are_failures(tmp_path, capsys):
    """As with another metric for a sweep that has ended."""
    assert launch(tmp_path, pretend([]), seeds=1) == 0
    views = {"metric": "test_accuracy_ema_views", "seeds": 1}
    assert launch(tmp_path, pretend([]), "evaluate.views=2", **views) == 1
    assert capsys.readouterr().err.count("finished run that has not measured it") == 2
    assert launch(tmp_path, pretend([]), metric="test_accuracy", seeds=1) == 0
    assert "| DP-SGD | 50.00 (-)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"privacy.num_updats": 3}, "unknown key privacy.num_updats: did you mean pri"),
        ({"privacy.expected_batch_size": 2000}, "privacy.expected_batch_size is 2000"),
        ({"data.name": "npz", "data.path": "no.npz"}, "no.npz"),
        ({"finetune.weights": "no.safetensors"}, "no.safetensors"),
        (
            {"pretrain.num_updates": 1, "public.name": "npz", "public.path": "no.npz"},
            "no.npz",
        ),
    ],
)
def test_a_run_that_would_be_refused_is_found_before_the_first(
    tmp_path, settings, message
):
    path, calls = tmp_path / "sweep", []
    common = {k: v for k, v in SMALL["common"].items() if k != "method"}
    rows = (("Good", {}), ("Bad", settings))
    with pytest.raises(UserError, match=message):
        launch(path, pretend(calls), rows=rows, common=common)
    assert calls == []
    assert not path.exists()


def test_images_that_one_row_only_whitens_by_must_fit_the_row_that_mixes_them(tmp_path):
    bank, zeros = tmp_path / "bank.npz", np.zeros((4, 8, 8), np.uint8)
    images = np.random.default_rng(0).integers(256, size=(30, 8, 8), dtype=np.uint8)
    np.savez(
        bank,
        train_images=images,
        train_labels=np.arange(30) % 2,
        test_images=zeros,
        test_labels=np.zeros(4, int),
        class_names=("cat", "dog"),
    )
    mixes = {"method.name": "dp_mix_diff", "method.k_base": 1, "method.k_diff": 1}
    common = {
        "public": {"name": "npz", "path": str(bank)},
        "finetune": {"whitening": 0.1},
        "method": {"k_self": 0},
    }
    plain = {"method.name": "dp_sgd", "method.k_base": 0}
    changes = {"base": f"{ROOT}/configs/scattering_digits.py:{{epsilon}}"}
    changes |= {"common": common, "seeds": 1, "paper": None}
    changes |= {"columns": {"epsilon": ("8",)}}
    calls = []
    assert (
        launch(tmp_path / "one", pretend(calls), rows=(("A", plain),), **changes) == 0
    )
    assert len(calls) == 1
    rows = (("A", plain), ("B", mixes))
    with pytest.raises(UserError, match="its classes must be those of the training"):
        launch(tmp_path / "both", pretend(calls), rows=rows, **changes)
    assert len(calls) == 1


# Processes.


def do(config, workdir):
    """A run of a few lines, done in the worker's process."""
    print(os.getpid(), jax.config.jax_compilation_cache_dir)
    if config == "refuse":
        raise UserError("too many")
    if config == "stop":
        with experiment.caught_signals() as signals:
            print("ready", flush=True)
            while not signals:
                time.sleep(0.01)
        return 128 + signals[0]
    {"raise": lambda: 1 / 0, "crash": lambda: os.kill(os.getpid(), signal.SIGKILL)}.get(
        config, lambda: None
    )()
    return experiment.DIVERGED if config == "diverge" else 0


@pytest.mark.slow  # three processes
def test_runs_share_a_process_until_one_crashes(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    caught = []

    def log(name):
        return tmp_path / f"{name}.log"

    def catch():
        wait_for(log("stop"), "ready")
        caught.append(signal.SIGTERM)

    thread = threading.Thread(target=catch)
    with sweeps.Worker(tmp_path / "cache", do) as worker:

        def run(name):
            return worker.run(name, Workdir(tmp_path / name), caught)

        assert run("end") is run("diverge") is None
        assert run("refuse") == f"too many ({log('refuse')})"
        assert log("end").read_text().split()[1] == str(tmp_path / "cache")
        assert log("refuse").read_text().endswith("error: too many\n")
        why = "exit status 1: ZeroDivisionError: division by zero"
        assert run("raise") == f"{why} ({log('raise')})"
        assert run("crash").startswith("killed by SIGKILL: ")
        thread.start()
        assert run("stop") == f"exit status 143 ({log('stop')})"
        assert run("end") is None  # after a signal nothing begins
    thread.join()
    names = ("end", "diverge", "refuse", "raise", "crash", "stop")
    pids = [log(name).read_text().split()[0] for name in names]
    assert len(set(pids[:4])) == 1
    assert len(set(pids[3:])) == 3
    assert log("end").read_text().count(" ") == 1


def test_a_run_that_a_killed_sweep_has_left_is_waited_for(tmp_path, capsys):
    worker, signals = sweeps.Worker(tmp_path), []
    thread = threading.Timer(0.3, signals.append, [signal.SIGTERM])
    with Workdir(tmp_path / "run").locked():
        thread.start()
        why = worker.run(None, Workdir(tmp_path / "run"), signals)
    assert why == f"workdir {tmp_path}/run is in use by another run"
    assert "waiting for another process" in capsys.readouterr().err
    thread.join()
    assert not (tmp_path / "run.log").exists()


def wait_for(path, text):
    deadline = time.time() + 120
    while not (path.exists() and text in path.read_text()):
        assert time.time() < deadline, path
        time.sleep(0.05)


def write_config(path, **changes):
    path.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({ {**SMALL, **changes}!r})\n"
    )
    return path


def test_a_mistake_is_one_line(tmp_path):
    grid = write_config(tmp_path / "grid.py")
    argv = [f"--config={grid}", f"--workdir={tmp_path}/sweep", "--config.metric=foo"]
    printed = call("experiments/sweep.py", argv)
    assert (printed.returncode, printed.stdout) == (2, "")
    assert printed.stderr.startswith("error: metric is 'foo': it must be one of test_")
    assert printed.stderr.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def outcome(workdir):
    """What must not depend on how often a sweep was killed."""
    timed = ("seconds", "nonprivate/images_per_second")
    untimed = [
        {key: value for key, value in line.items() if key not in timed}
        for line in read_csv(workdir)
    ]
    return (workdir / "table.md").read_text(), untimed


@pytest.mark.slow
def test_killed_and_stopped_half_way_it_gives_the_same_table(tmp_path):
    """As users run it: three processes, of which the first two end early."""
    path = write_config(tmp_path / "grid.py", rows=ROWS[:1])

    def start(workdir):
        return subprocess.Popen(
            [
                *(sys.executable, f"{ROOT}/experiments/sweep.py"),
                *(f"--config={path}", f"--workdir={workdir}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole, workdir = tmp_path / "whole", tmp_path / "sweep"
    process = start(whole)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    logs = [workdir / f"dp-sgd/epsilon=3/seed={seed}.log" for seed in (0, 1)]
    process = start(workdir)
    wait_for(logs[0], "calibrating")
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert said.endswith("stopped: the same command goes on from there\n")
    with Workdir(logs[0].with_suffix("")).locked():  # its run has stopped too
        assert "SIGTERM: saving" in logs[0].read_text()
    process = start(workdir)
    wait_for(logs[1], "calibrating")
    process.kill()
    process.communicate()
    process = start(workdir)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert outcome(workdir) == outcome(whole)
