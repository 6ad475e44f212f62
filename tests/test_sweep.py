"""Sweeps: which runs there are, what their tables say, and that they survive."""

import csv
import io
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

import ml_collections
import pytest
import scipy.stats

from dpmix_jax import UserError, tables
from dpmix_jax.command_line import load_experiment
from dpmix_jax.sweep import from_config_dict
from dpmix_jax.tables import paired_test, to_csv, to_markdown
from dpmix_jax.workdir import Workdir
from tests.conftest import ROOT
from tests.test_configs import module

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
        "model": {"features": "4,8", "groups": 2},
        "privacy": {"num_updates": 3},
        "performance": {"microbatch_size": 256},
    },
    "seeds": 2,
    "metric": "test_accuracy_ema",
    "paper": {"source": "A paper.", "cells": (("DP-SGD", "3", "50.0 (.1)"),)},
}


def config(*settings, **changes):
    return from_config_dict(ml_collections.ConfigDict({**SMALL, **changes}), settings)


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
    assert last.flags == (
        f"--config={ROOT}/configs/digits.py:8",
        "--config.model.features=4,8",
        "--config.model.groups=2",
        "--config.performance.microbatch_size=256",
        "--config.privacy.num_updates=3",
        "--config.optimizer.momentum=0",
        "--config.method.name=dp_sgd",
        "--config.optimizer.learning_rate=0.5",
        "--config.seed=1",
    )
    built = load_experiment(last.flags)
    assert (built.seed, built.privacy.epsilon) == (1, 8.0)
    assert (built.method.name, built.privacy.num_updates) == ("dp_sgd", 3)
    assert (built.optimizer.learning_rate, built.optimizer.momentum) == (0.5, 0.0)


def test_a_sweep_without_columns_has_one_cell_a_row():
    runs = config(base="configs/digits.py", columns={}, seeds=1, paper=None).runs()
    assert [str(run.folder) for run in runs] == ["dp-sgd/seed=0", "k-1-half/seed=0"]


def test_set_comes_before_common():
    (first, *_) = config("privacy.num_updates=7", "data.validation_size=9").runs()
    built = load_experiment(first.flags)
    assert (built.privacy.num_updates, built.data.validation_size) == (7, 9)


@pytest.mark.parametrize("data", ["", "cifar10", "digits", "fashion_mnist"])
def test_table11_compares_at_equal_compute(data):
    file = module(ROOT / "configs/table11.py")
    table11 = from_config_dict(file.get_config(data) if data else file.get_config())
    runs = table11.runs()
    assert len(runs) == 3 * 2 * 5
    built = [load_experiment([*run.flags]) for run in runs[:6]]
    assert {b.data.name for b in built} == {data or "cifar10"}
    assert [b.privacy.epsilon for b in built] == [1.0, 8.0] * 3
    assert [b.method.name for b in built[::2]] == [
        "self_aug",
        "self_aug",
        "dp_mix_self",
    ]
    fewer, equal, mixed = (b.method.set_size for b in built[::2])
    assert fewer == built[4].method.k_base < equal == mixed
    if data in ("", "cifar10"):
        assert (fewer, equal) == (16, 34)
        assert "| 57.1 (.4) |" in to_markdown(table11, [])
        for cell in table11.paper["cells"]:
            assert cell[0] in table11.rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": 3}, "unknown key sedes: did you mean seeds?"),
        ({"seeds": 0}, "seeds is 0: it must be at least 1"),
        ({"seeds": "2"}, "seeds is '2': it must be of type int"),
        ({"rows": ()}, "rows is empty"),
        ({"rows": {"a": {}}}, "rows is {'a': {}}: it must be of type tuple"),
        ({"rows": (("a",),)}, "rows has ('a',): it must be a name and its settings"),
        ({"rows": (("a", {}), ("a", {}))}, "rows has 'a' twice"),
        ({"rows": (("a b", {}), ("a-b", {}))}, "rows or columns share the folder a-b/"),
        ({"columns": {"epsilon": "3"}}, "columns.epsilon is '3': it must be a list"),
        (
            {"base": "a.py:{delta}"},
            "base is a.py:{delta}: delta is none of the columns",
        ),
        (
            {"common": {"method": {"name": "dp_sgd"}}},
            "rows.DP-SGD: method.name is set twice",
        ),
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
    values = ml_collections.ConfigDict(
        {k: v for k, v in SMALL.items() if k != "metric"}
    )
    with pytest.raises(UserError, match="metric is missing from the config"):
        from_config_dict(values)
    with pytest.raises(UserError, match="--set is seed: it must be <key>=<value>"):
        config("seed")


# The tables.


def record(row, epsilon, seed, value):
    keys = {"row": row, "epsilon": epsilon, "seed": seed, "test_accuracy_ema": value}
    return {**keys, "device": "2 x GPU", "jax": "0.10"}


def test_table_by_hand():
    values = {"DP-SGD": (0.50, 0.52, 0.57), "K = 1, half": (0.51, 0.55)}
    grid = config(seeds=3, columns={"epsilon": ("3", "8")})
    records = [
        record(row, "3", seed, value)
        for row, line in values.items()
        for seed, value in enumerate(line)
    ]
    text = to_markdown(grid, records)
    assert text.startswith(
        """# Tiny

`test_accuracy_ema` in %, at the last update: median (standard deviation) over 3 paired\
 seeds.

**5 of 12 runs have finished.**

| | epsilon = 3, ours | paper | epsilon = 8, ours | paper |
| --- | --- | --- | --- | --- |
| DP-SGD | 52.00 (3.61) | 50.0 (.1) | - | - |
| K = 1, half | 53.00 (2.83), n = 2 | - | - | - |

- ours: run here, on 2 x GPU, jax 0.10.
- paper: as printed, not run here. A paper.
"""
    )
    assert "| DP-SGD | epsilon = 3 | 3 | 52.00 | 3.61 | 50.00 | 57.00 |\n" in text
    assert "| DP-SGD | epsilon = 8 | 0 | - | - | - | - |\n" in text
    # Differences of the seeds that both have: 1 and 3 points.
    p = scipy.stats.ttest_rel([0.51, 0.55], [0.50, 0.52]).pvalue
    names = "| K = 1, half less DP-SGD | epsilon = 3 |"
    assert f"{names} 2 | +2.00 | 1.41 | {p:.2g} | 1.4 |" in text
    assert "best" not in text


def test_settings_are_chosen_by_the_median_on_validation_records():
    metric = "nonprivate/validation/accuracy_ema"
    rates = (0.5, 1.0, 2.0)
    columns = {"epsilon": ("1", "8"), "optimizer": {"learning_rate": rates}}
    grid = config(metric=metric, seeds=3, columns=columns, rows=ROWS[:1], paper=None)
    values = {0.5: (0.5, 0.5, 0.5), 1.0: (0.9, 0.1, 0.2), 2.0: (0.5, 0.6, 0.1)}
    records = [
        {
            **{"row": "DP-SGD", "epsilon": epsilon, "optimizer.learning_rate": rate},
            **{"seed": seed, metric: value + (epsilon == "8" and rate == 2.0)},
        }
        for epsilon in ("1", "8")
        for rate, line in values.items()
        for seed, value in enumerate(line)
    ]
    first, second = tables.choices(grid, records)
    assert first == {
        "row": "DP-SGD",
        "given": {"epsilon": "1"},
        "settings": {"method.name": "dp_sgd", "optimizer.learning_rate": 0.5},
        "median": 0.5,  # of equal ones the first, and not the best of all runs
    }
    assert second["settings"]["optimizer.learning_rate"] == 2.0
    chosen = "epsilon = 1, method.name = dp_sgd, optimizer.learning_rate = 0.5"
    assert (
        f"## Chosen\n\n| row | settings | median |\n| --- | --- | --- |\n| DP-SGD |\
 {chosen} | 50.00 |\n"
        in to_markdown(grid, records)
    )
    assert tables.choices(grid, records[1:]) == []  # nor before all have finished
    tested = config(metric="test_accuracy_ema", seeds=1, columns={"epsilon": ("3",)})
    results = [record(row, "3", 0, 0.5) for row in tested.rows]
    assert tables.choices(tested, results) == []
    assert "Chosen" not in to_markdown(tested, results)


def test_a_metric_that_is_no_accuracy_is_no_percentage():
    grid = config(metric="nonprivate/loss", paper=None)
    records = [{"row": "DP-SGD", "epsilon": "3", "seed": 0, "nonprivate/loss": 0.01234}]
    text = to_markdown(grid, records)
    assert "`nonprivate/loss`, at the last update" in text
    assert "| DP-SGD | 0.0123 (-), n = 1 |" in text
    assert "paper" not in text


def test_paired_test():
    values = [0.01, -0.02, 0.03, 0.025, 0.04]
    p, d = paired_test(values)
    assert p == pytest.approx(scipy.stats.ttest_1samp(values, 0.0).pvalue)
    assert d == pytest.approx(statistics.fmean(values) / statistics.stdev(values))
    assert paired_test([0.01]) == paired_test([0.01] * 3) == (None, None)


def test_csv_takes_every_column():
    text = to_csv([{"row": "a, b", "x": 1}, {"row": "c", "y": 2}])
    assert text == 'row,x,y\n"a, b",1,\nc,,2\n'
    assert to_csv([]) == "\n"


# Whole sweeps by the command line.


def write_config(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "grid.py"
    path.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({ {**SMALL, **changes}!r})\n"
    )
    return path


def command(workdir, *flags, rows=ROWS[:1], **changes):
    """One row unless told otherwise: a run takes about ten seconds."""
    path = write_config(workdir.parent / "config", rows=rows, **changes)
    program = [sys.executable, f"{ROOT}/experiments/sweep.py", f"--config={path}"]
    return [*program, f"--workdir={workdir}", *flags]


def run(*args, **changes):
    return subprocess.run(command(*args, **changes), capture_output=True, text=True)


def lines(workdir):
    return list(csv.DictReader(io.StringIO((workdir / "runs.csv").read_text())))


def outcome(workdir):
    """What must not depend on how often a sweep was killed."""
    timings = ("seconds", "images_per_second")
    untimed = [{k: v for k, v in x.items() if k not in timings} for x in lines(workdir)]
    return (workdir / "table.md").read_text(), untimed


def mtimes(workdir):
    return {p: p.stat().st_mtime_ns for p in workdir.glob("*/*/*/results.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "sweep"
    return workdir, run(workdir)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished sweep, as it was when seed 0 was done."""
    workdir = shutil.copytree(finished[0], tmp_path / "sweep")
    for path in workdir.glob("*/*/seed=1"):
        shutil.rmtree(path)
        path.with_name("seed=1.log").unlink()
    return workdir


def test_what_a_sweep_writes_and_prints(finished):
    workdir, done = finished
    assert done.returncode == 0, done.stderr
    table, _ = outcome(workdir)
    assert done.stdout == table
    say = done.stderr.splitlines()
    assert say[0] == f"2 runs into {workdir}, 0 of them finished before"
    assert len(say) == 3
    assert say[1].startswith("run 1/2  DP-SGD, epsilon = 3, seed 0: test_accuracy_ema ")
    assert say[2].endswith("ETA 0:00:00")
    by_row = {}
    for line in lines(workdir):
        results = Workdir(workdir / line["workdir"]).results()
        for key in ("test_accuracy", "test_accuracy_ema", "noise_multiplier", "jax"):
            assert line[key] == str(results[key])
        assert line["measured_epsilon"] == str(results["epsilon"])
        assert (line["epsilon"], line["step"]) == ("3", "3")
        log = workdir / f"{line['workdir']}.log"
        assert "test accuracy raw" in log.read_text()
        by_row.setdefault(line["row"], []).append(float(line["test_accuracy_ema"]))
    assert [line["seed"] for line in lines(workdir)] == ["0", "1"]
    for row, values in by_row.items():
        median, sd = statistics.median(values), statistics.stdev(values)
        assert f"| {row} | {100 * median:.2f} ({100 * sd:.2f}) |" in table
    assert "| DP-SGD | " in table
    assert " | 50.0 (.1) |" in table


def test_finished_runs_are_not_repeated(finished):
    workdir, first = finished
    before = mtimes(workdir)
    again = run(workdir)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert again.stderr == f"2 runs into {workdir}, 2 of them finished before\n"
    assert mtimes(workdir) == before


def test_runs_of_other_settings_are_failures(copy):
    """They are neither overwritten nor taken for what they are not."""
    before = mtimes(copy)
    done = run(copy, "--set=privacy.num_updates=4", "--config.seeds=1")
    assert done.returncode == 1
    assert "1 runs into" in done.stderr
    failed = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1
    assert "is of another experiment, use another --workdir; these differ:" in failed[0]
    assert "privacy.num_updates (3 there, 4 here)" in failed[0]
    assert "**0 of 1 runs have finished.**" in done.stdout
    assert mtimes(copy) == before


def wait_for(path, text):
    deadline = time.time() + 120
    while not (path.exists() and text in path.read_text()):
        assert time.time() < deadline, path
        time.sleep(0.05)


def start(*args, **changes):
    return subprocess.Popen(
        command(*args, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_half_way_it_gives_the_same_table(finished, copy):
    before = mtimes(copy)
    assert len(before) == 1
    process = start(copy)
    wait_for(copy / "dp-sgd/epsilon=3/seed=1.log", "calibrating")
    process.kill()
    process.communicate()
    done = run(copy)
    assert done.returncode == 0, done.stderr
    assert outcome(copy) == outcome(finished[0])
    assert {path: mtimes(copy)[path] for path in before} == before


def test_a_stopped_sweep_stops_its_run_first(copy):
    process = start(copy)
    log = copy / "dp-sgd/epsilon=3/seed=1.log"
    wait_for(log, "calibrating")
    process.terminate()
    _, rest = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert rest.endswith("stopped: the same command goes on from there\n")
    with Workdir(log.with_suffix("")).locked():
        assert "SIGTERM: saving" in log.read_text()


def test_a_failed_run_does_not_stop_the_rest(copy):
    rows = (ROWS[0], ("Broken", {"privacy.expected_batch_size": 2000}), ROWS[1])
    # As if a killed sweep had left the last run running: it is waited for, not lost.
    with Workdir(copy / "k-1-half/epsilon=3/seed=0").locked():
        process = start(copy, rows=rows, seeds=1)
        say = []
        for line in process.stderr:
            say.append(line.strip())
            if line.startswith("waiting for the process that is still running"):
                break
    table, rest = process.communicate()
    say += rest.splitlines()
    assert process.returncode == 1
    log = copy / "broken/epsilon=3/seed=0.log"
    why = (
        "Broken, epsilon = 3, seed 0: exit status 2:"
        " privacy.expected_batch_size is 2000: it must be at most the number of"
        f" training records, 1437 ({log})"
    )
    assert say[0].endswith("1 of them finished before")
    assert say[1] == f"run 2/3  {why.replace(': exit', ': FAILED: exit')}; ETA -:--:--"
    assert say[3].startswith("run 3/3  K = 1, half, epsilon = 3, seed 0: test_")
    assert say[4:] == [f"failed: {why}"]
    assert "**2 of 3 runs have finished.**" in table
    assert [line["row"] for line in lines(copy)] == ["DP-SGD", "K = 1, half"]


def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path):
    workdir = tmp_path / "sweep"
    done = run(workdir, "--set=privacy.num_updats=3")
    message = "unknown key privacy.num_updats: did you mean privacy.num_updates?"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {message}\n"
    assert not workdir.exists()


def test_table11_names_the_data_it_knows():
    with pytest.raises(
        UserError, match="data is 'mnist': it must be one of cifar10, d"
    ):
        module(ROOT / "configs/table11.py").get_config("mnist")


def test_the_validation_accuracy_can_be_the_metric(tmp_path):
    grid = config(metric="nonprivate/validation/accuracy_ema")
    workdir = Workdir(tmp_path)
    workdir.add_metrics({"step": 3, "nonprivate/validation/accuracy_ema": 0.25})
    workdir.end({"test_accuracy": 0.5, "confusion_ema": [[1]]})
    found = tables.read_record(grid, grid.runs()[0], workdir)
    assert found["nonprivate/validation/accuracy_ema"] == 0.25
    assert "test_accuracy" not in found  # it must not play a part in the choice
    assert "confusion_ema" not in found
    grid = config(metric="test_accuracy")
    assert tables.read_record(grid, grid.runs()[0], workdir)["test_accuracy"] == 0.5
    grid = config(metric="confusion_ema")
    with pytest.raises(UserError) as error:
        tables.read_record(grid, grid.runs()[0], workdir)
    assert str(error.value) == (
        "metric is 'confusion_ema': it must be one of step,"
        " nonprivate/validation/accuracy_ema, test_accuracy"
    )
