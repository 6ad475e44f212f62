"""Whole runs by the command line: what they write, and that they survive."""

import ast
import json
import os
import pathlib
import re
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from dpmix_jax import experiment
from dpmix_jax.config import from_config_dict
from dpmix_jax.workdir import Workdir
from tests.conftest import ROOT
from tests.programs import run_each
from tests.test_config import load as load_config

SMALL = {
    "seed": 3,
    "model.features": "4,8",
    "model.groups": 2,
    "method.k_base": 2,
    "method.k_self": 1,
    "privacy.num_updates": 12,
    "privacy.expected_batch_size": 200,
    "performance.microbatch_size": 64,
    "logging.log_every": 2,
    "logging.eval_every": 4,
    "logging.checkpoint_every": 3,
}


@pytest.fixture(scope="module", autouse=True)
def as_users_run_it():
    """Programs compile as they do outside of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ["USERS_XLA_FLAGS"])
        yield


def command(workdir, **overrides):
    options = {**SMALL, **{k.replace("__", "."): v for k, v in overrides.items()}}
    return [
        sys.executable,
        "experiments/run.py",
        "--config=configs/digits.py",
        f"--workdir={workdir}",
        *(f"--config.{k}={v}" for k, v in options.items() if v is not None),
    ]


def run(workdir, **overrides):
    return subprocess.run(
        command(workdir, **overrides), cwd=ROOT, capture_output=True, text=True
    )


def metrics(workdir):
    lines = Workdir(pathlib.Path(workdir)).metrics()
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}
        for line in lines
    ]


def outcome(workdir):
    """Everything of a finished run that must not depend on how often it was killed."""
    results = json.loads((workdir / "results.json").read_text())
    del results["seconds"]
    return {
        "weights": (workdir / "model.safetensors").read_bytes(),
        "metrics": metrics(workdir),
        "privacy": (workdir / "privacy.json").read_text(),
        "results": results,
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, run(workdir)


def test_what_a_run_writes_and_prints(finished):
    workdir, done = finished
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"test accuracy raw [\d.]+ %, EMA [\d.]+ %; \(3, 1e-05\)-DP, sigma [\d.]+;"
        r" \d+ s\n",
        done.stdout,
    )
    assert re.search(
        r"update  4/12  nonprivate loss [\d.]+  epsilon [\d.]+  [\d,]+ images/s"
        r"  ETA \d:\d\d:\d\d  test [\d.]+% \(EMA\)\n",
        done.stderr,
    )
    assert {path.name for path in workdir.iterdir() if path.name[0] != "."} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "model.safetensors",
        "privacy.json",
        "PRIVACY.md",
        "report.html",
        "results.json",
    }
    assert [line["step"] for line in metrics(workdir)] == [2, 4, 6, 8, 10, 12]
    epsilons = [line["epsilon"] for line in metrics(workdir)]
    assert epsilons == sorted(epsilons)
    facts = json.loads((workdir / "privacy.json").read_text())
    assert epsilons[-1] == facts["epsilon_pld"] == pytest.approx(3.0, rel=1e-3)
    assert facts["images_per_record"] == 3
    assert facts["num_records"] == 1437
    assert "(3, 1e-05)-differentially private" in (workdir / "PRIVACY.md").read_text()
    evaluated = [line for line in metrics(workdir) if "test/accuracy" in line]
    assert [line["step"] for line in evaluated] == [4, 8, 12]
    results = json.loads((workdir / "results.json").read_text())
    assert results["test_accuracy_ema"] == evaluated[-1]["test/accuracy_ema"]
    assert np.sum(results["confusion_ema"]) == 360


def test_the_report_stands_alone_and_keeps_secrets(finished):
    workdir, _ = finished
    page = (workdir / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    for words in ("Privacy statement", "EMA", "view(s), 1 mix(es)", "k_self"):
        assert words in page
    for secret in ("nonprivate/loss", "nonprivate/clipped", '"seed"'):
        assert secret not in page.replace("&quot;", '"')


def test_weights_are_released_and_secrets_are_not_left(finished):
    workdir, _ = finished
    weights = safetensors.numpy.load_file(workdir / "model.safetensors")
    raw = {name for name in weights if name.startswith("params/")}
    assert raw
    assert {f"ema_{name}" for name in raw} == set(weights) - raw
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["12"]
    assert stat.S_IMODE((workdir / "checkpoints").stat().st_mode) == 0o700
    assert not (workdir / "secret.json").exists()


def test_a_finished_run_is_not_repeated(finished):
    workdir, first = finished
    before = outcome(workdir)
    again = run(workdir)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert again.stderr == f"finished before: {workdir}\n"
    assert outcome(workdir) == before


@pytest.mark.parametrize(
    "overrides",
    [
        {"privacy__epsilon": 8},
        {"method__name": "dp_sgd"},
        {"seed": 4},
    ],
)
def test_a_workdir_of_another_experiment_is_refused(finished, overrides):
    workdir, _ = finished
    before = outcome(workdir)
    refused = run(workdir, **overrides)
    key = next(iter(overrides)).replace("__", ".")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert (
        f"is of another experiment, use another --workdir; these differ: {key} ("
        in (refused.stderr)
    )
    assert outcome(workdir) == before


def kill_when(process, text, number, count=1):
    """Sends a signal after a line of output that contains a text."""
    for line in process.stderr:
        if text in line:
            count -= 1
            if count == 0:
                process.send_signal(number)
                break
    rest = process.stderr.read()
    process.stderr.close()
    return process.wait(), rest


def start(workdir, **overrides):
    return subprocess.Popen(
        command(workdir, **overrides),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def test_killed_twice_a_run_ends_with_the_same_bits(finished, tmp_path):
    expected = outcome(finished[0])
    workdir = tmp_path / "run"
    for text in ("update  4/12", "update  8/12"):
        status, _ = kill_when(start(workdir), text, signal.SIGKILL)
        assert status == -signal.SIGKILL
        assert not (workdir / "results.json").exists()
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "epsi')  # a line that the kill cut off
    done = run(workdir, performance__microbatch_size=64)
    assert done.returncode == 0, done.stderr
    assert "going on after update 6" in done.stderr
    assert outcome(workdir) == expected


@pytest.mark.parametrize(
    "name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)]
)
def test_a_stopped_run_saves_first(finished, tmp_path, name):
    number = getattr(signal, name)
    workdir = tmp_path / "run"
    status, rest = kill_when(start(workdir), "update  4/12", number)
    assert status == 128 + number
    saved = int(re.search(r"stopped after update (\d+) of 12", rest)[1])
    assert 4 <= saved < 12
    assert max(int(p.name) for p in (workdir / "checkpoints").iterdir()) == saved
    done = run(workdir)
    assert f"going on after update {saved}" in done.stderr
    assert outcome(workdir) == outcome(finished[0])


def test_a_secret_seed_survives_a_kill_and_is_then_forgotten(tmp_path):
    """Two runs differ; one that was killed goes on with its own randomness."""
    weights = []
    for name in ("a", "b"):
        workdir = tmp_path / name
        kill_when(start(workdir, seed=None), "update  4/12", signal.SIGKILL)
        secret = workdir / "secret.json"
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        seed = json.loads(secret.read_text())["seed"]
        assert seed > 2**64
        done = run(workdir, seed=None)
        assert done.returncode == 0, done.stderr
        assert not secret.exists()
        for path in workdir.rglob("*"):
            assert not path.is_file() or str(seed).encode() not in path.read_bytes()
        assert "128 secret bits" in (workdir / "PRIVACY.md").read_text()
        weights.append((workdir / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]


def test_resuming_on_other_data_is_refused(tmp_path):
    rng = np.random.default_rng(0)

    def write(num):
        np.savez(
            tmp_path / "data.npz",
            train_images=rng.integers(0, 256, (num, 8, 8, 1)).astype(np.uint8),
            train_labels=rng.integers(0, 2, num),
            test_images=rng.integers(0, 256, (9, 8, 8, 1)).astype(np.uint8),
            test_labels=rng.integers(0, 2, 9),
            class_names=["cat", "dog"],
        )

    options = {"data__name": "npz", "data__path": tmp_path / "data.npz"}
    workdir = tmp_path / "run"
    write(1437)  # as many as digits: the noise is calibrated already
    kill_when(start(workdir, **options), "update  4/12", signal.SIGTERM)
    write(1437)
    refused = run(workdir, **options)
    assert refused.returncode == 2
    assert "holds a run that began with other data: put those back" in refused.stderr


def test_one_workdir_one_run(tmp_path):
    workdir = tmp_path / "run"
    with Workdir(workdir).locked():
        second = run(workdir)
    assert second.returncode == 2
    assert second.stderr == f"error: workdir {workdir} is in use by another run\n"


@pytest.mark.slow
def test_a_kill_while_the_results_are_written(finished, tmp_path, monkeypatch):
    """Between any two files: the same command ends with the same bits, nothing left."""
    expected = outcome(finished[0])
    workdir = tmp_path / "run"
    values = [arg.split("=", 1) for arg in command(workdir)[4:]]
    config = load_config()
    changes = {key.removeprefix("--config."): parse(value) for key, value in values}
    changes["performance.microbatch_size"] = "64"
    config.update_from_flattened_dict(changes)

    class Killed(BaseException):
        pass

    def attempt(allowed):
        left = iter(range(allowed))
        replace = os.replace

        def counted(source, target):
            if next(left, None) is None:
                raise Killed
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("dpmix_jax.files.os.replace", counted)
            patch.setattr("dpmix_jax.performance.keep_compiled_code", lambda _: None)
            try:
                return experiment.run(from_config_dict(config), Workdir(workdir))
            except Killed:
                return None

    # Three files begin a run; of the rest, each attempt gets further.
    attempts = [attempt(allowed) for allowed in (3, 4, 6, 8)]
    assert attempts == [None] * 3 + [0]
    assert outcome(workdir) == expected
    assert not (workdir / "secret.json").exists()
    assert not list(workdir.glob(".*.partial"))


def parse(value):
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


MISTAKES = (
    ([], "--config is missing: give the path of a config file"),
    (["--config=none.py"], "--config is none.py: there is no such file"),
    (["--config=none.py:8"], "--config is none.py: there is no such file"),
    (
        ["--config=configs/digits.py:5"],
        "--config cannot be loaded: epsilon is '5': it must be one of 1, 2, 3, 4, 6, 8",
    ),
    (
        ["--config=configs/digits.py", "--config.method.nme=x"],
        "unknown key method.nme: did you mean method.name?",
    ),
    (
        ["--config=configs/digits.py", "--config.metod.name=x"],
        "unknown key metod: did you mean method?",
    ),
    (
        ["--config=configs/digits.py", "--config.privacy.epsilon=much"],
        "flag --config.privacy.epsilon=much: could not convert string to float: 'much'",
    ),
    (["--confg=x"], "Unknown command line flag 'confg'. Did you mean: config ?"),
    (
        ["--config=configs/digits.py", "--config.privacy.epsilon=0"],
        "privacy.epsilon is 0.0: it must be positive and finite",
    ),
    (
        ["--config=configs/digits.py", "--config.model.groups=7"],
        "model 'cnn' with options {'features': (16, 32), 'groups': 7} does not fit"
        " images of (8, 8, 1): Number of groups (7) does not divide the number of"
        " channels (16).",
    ),
    (
        [
            "--config=configs/digits.py",
            "--config.privacy.expected_batch_size=1438",
        ],
        "privacy.expected_batch_size is 1438: it must be at most the number of"
        " training records, 1437",
    ),
    (
        ["--config=configs/digits.py", "--workdir=README.md/run"],
        "workdir README.md/run is not writable: Not a directory",
    ),
)


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mistakes") / "run"
    commands = [
        [f"--workdir={workdir}", *flags]  # of two, the last one counts
        for flags, _ in MISTAKES
    ]
    return workdir, run_each("experiments/run.py", commands)


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_mistake_is_one_line(mistakes, number):
    workdir, done = mistakes
    assert done[number].returncode == 2
    assert done[number].stderr == f"error: {MISTAKES[number][1]}\n"
    assert done[number].stdout == ""
    written = workdir.parent.rglob("*")
    assert {path.name for path in written} <= {"run", ".lock"}


def test_a_workdir_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    done = run(tmp_path)
    assert done.returncode == 2
    assert "holds thesis.tex but no config.json: use a new or empty" in done.stderr


def on_four_devices():
    four = "--xla_force_host_platform_device_count=4"
    return {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {four}"}


def test_a_microbatch_that_does_not_divide_over_the_devices(tmp_path):
    done = subprocess.run(
        command(tmp_path / "run", performance__microbatch_size=6),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=on_four_devices(),
    )
    assert done.returncode == 2
    assert "must be a multiple of the number of devices, 4\n" in done.stderr


def test_on_four_devices_the_same_run_comes_out(finished, tmp_path):
    """To float rounding."""
    done = subprocess.run(
        command(tmp_path / "run"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=on_four_devices(),
    )
    assert done.returncode == 0, done.stderr
    one, four = (
        safetensors.numpy.load_file(workdir / "model.safetensors")
        for workdir in (finished[0], tmp_path / "run")
    )
    for name, value in one.items():
        np.testing.assert_allclose(four[name], value, atol=1e-4)


def test_a_large_delta_is_warned_of(finished):
    done = run(finished[0], privacy__delta=1e-3)
    assert done.returncode == 2  # the workdir is of another
    assert "warning: privacy.delta is 0.001, not below 1/N = 0.000696" in done.stderr
