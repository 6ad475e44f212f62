"""Metrics of a run for other programs."""

import csv
import json
import sys
import types

import pytest

from tests.programs import call

LINES = (
    {"step": 2, "epsilon": 0.5, "nonprivate/loss": 2.25},
    {"step": 4, "epsilon": 0.75, "nonprivate/loss": 1.5, "test/accuracy": 0.5},
)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def exported(run, *flags):
    return call("experiments/metrics.py", [f"--run={run}", *flags])


def test_csv_has_a_line_for_each_and_a_column_for_all(run, tmp_path):
    done = exported(run, f"--csv={tmp_path}/metrics.csv")
    assert done.stdout == "2 lines of metrics\n"
    # As private as the metrics of the workdir.
    assert (tmp_path / "metrics.csv").stat().st_mode & 0o777 == 0o600
    with open(tmp_path / "metrics.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert list(second) == [*LINES[1]]
    assert (first["test/accuracy"], second["test/accuracy"]) == ("", "0.5")
    assert float(first["nonprivate/loss"]) == 2.25


class Recorder:
    """Stands for a writer of tensorboardX and for a run of wandb."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs, self.calls = args, kwargs, []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.calls.append("closed")

    def add_scalar(self, *args):
        self.calls.append(args)

    def log(self, line, step):
        self.calls.append((line, step))


@pytest.mark.parametrize(
    ("package", "function", "flag"),
    [
        ("tensorboardX", "SummaryWriter", "--tensorboard=logs"),
        ("wandb", "init", "--wandb=project"),
    ],
)
def test_other_programs_get_every_value_at_its_step(
    run, monkeypatch, package, function, flag
):
    made = []

    def make(*args, **kwargs):
        made.append(Recorder(*args, **kwargs))
        return made[-1]

    module = types.SimpleNamespace(**{function: make})
    monkeypatch.setitem(sys.modules, package, module)
    assert exported(run, flag).returncode == 0
    (recorder,) = made
    if package == "wandb":
        assert recorder.kwargs == {"project": "project", "name": "run"}
        assert recorder.calls == [*((line, line["step"]) for line in LINES), "closed"]
    else:
        assert recorder.args == ("logs",)
        every = [(k, v, line["step"]) for line in LINES for k, v in line.items()]
        assert recorder.calls == [*every, "closed"]


def test_mistakes_are_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    needs = '--tensorboard needs the extra, pip install "dpmix_jax[tensorboard]" ('
    for flags, message in (
        ([f"--run={run}"], "give one of --csv, --tensorboard and --wandb"),
        ([f"--run={tmp_path}/none", "--csv=x"], f"--run is {tmp_path}/none: it must"),
        ([f"--run={run}", "--tensorboard=x"], needs),
        (
            [f"--run={run}", "--csv=none/x"],
            "[Errno 2] No such file or directory: 'none/x'",
        ),
        ([f"--run={run}", f"--csv={run}"], f"[Errno 21] Is a directory: '{run}'\n"),
        (
            [f"--run={run}", f"--csv={run}/metrics.jsonl/x"],
            f"[Errno 20] Not a directory: '{run}/metrics.jsonl/x'\n",
        ),
    ):
        done = call("experiments/metrics.py", flags)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {message}")
