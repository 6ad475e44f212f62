"""What is made of a sweep's runs: tables, settings chosen, CSV, plots."""

import re

import pytest
import scipy.stats

from dpmix_jax import UserError
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sweeps import plots, tables
from tests.programs import call
from tests.test_sweep import ROWS, VALIDATED, config


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
    text = tables.to_markdown(grid, records)
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
    assert f"{names} 2 | +2.00 | 1.41 | {p:.2g} | 1.4 |" in text  # d = 2 / sqrt(2)
    assert "best" not in text


def test_a_baseline_is_what_all_others_are_compared_with():
    rows = (*ROWS, ("Third", {}))
    records = [record(row, "3", seed, 0.5) for row, _ in rows for seed in (0, 1)]

    def compared(**changes):
        text = tables.to_markdown(config(rows=rows, **changes), records)
        return re.findall(r"^\| (.* less .*?) \|", text, flags=re.MULTILINE)

    assert compared(baseline="K = 1, half") == [
        "DP-SGD less K = 1, half",
        "Third less K = 1, half",
    ]
    assert compared() == [
        "K = 1, half less DP-SGD",
        "Third less DP-SGD",
        "Third less K = 1, half",
    ]


def test_settings_are_chosen_by_the_median_on_validation_records():
    columns = {"epsilon": ("1", "8"), "optimizer": {"learning_rate": (0.5, 1.0, 2.0)}}
    grid = config(metric=VALIDATED, seeds=3, columns=columns, rows=ROWS[:1], paper=None)
    values = {0.5: (0.5, 0.5, 0.5), 1.0: (0.9, 0.1, 0.2), 2.0: (0.5, 0.6, 0.1)}
    records = [
        {
            **{"row": "DP-SGD", "epsilon": epsilon, "optimizer.learning_rate": rate},
            **{"seed": seed, VALIDATED: value + (epsilon == "8" and rate == 2.0)},
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
    text = tables.to_markdown(grid, records)
    assert f"| DP-SGD | {chosen} | 50.00 |\n" in text.split("## Chosen")[1]
    assert tables.choices(grid, records[1:]) == []  # nor before all have finished
    tested = config(seeds=1, columns={"epsilon": ("3",)})
    results = [record(row, "3", 0, 0.5) for row in tested.rows]
    assert tables.choices(tested, results) == []
    assert "Chosen" not in tables.to_markdown(tested, results)


def test_a_metric_that_is_no_accuracy_is_no_percentage():
    grid = config(metric="nonprivate/loss", paper=None)
    records = [{"row": "DP-SGD", "epsilon": "3", "seed": 0, "nonprivate/loss": 0.01234}]
    text = tables.to_markdown(grid, records)
    assert "`nonprivate/loss`, at the last update" in text
    assert "| DP-SGD | 0.01234 (-), n = 1 |" in text
    assert "paper" not in text


def test_differences_that_no_test_can_judge():
    assert tables.paired_test([0.01]) == tables.paired_test([0.01] * 3) == (None, None)
    assert tables.paired_test([0.1, float("nan")]) == (None, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_run_that_diverged_is_in_the_table(bad):
    grid = config(metric="nonprivate/loss", paper=None)
    records = [
        {"row": "DP-SGD", "epsilon": "3", "seed": seed, "nonprivate/loss": loss}
        for seed, loss in enumerate((0.5, bad))
    ]
    assert "| DP-SGD | epsilon = 3 | 2 | " in tables.to_markdown(grid, records)


# Written again from the CSV, by cited rows, for LaTeX, and drawn.

PLAIN = (("DP-SGD", {}), ("Other", {"method.name": "self_aug"}))
LADDER = {
    "columns": {"epsilon": ("1", "3", "8")},
    "paper": {
        "source": "Another paper.",
        "cells": (("Theirs", "1", "40"), ("Theirs", "3", "45.0 (.1)")),
    },
}


def ladder_records(**others):
    return [
        {**record(row, epsilon, seed, value + seed / 100), "seconds": 9.5, **others}
        for row, value in (("DP-SGD", 0.5), ("K = 1, half", 0.6))
        for epsilon in ("1", "8")
        for seed in (0, 1)
    ]


def test_rows_that_the_paper_alone_has_stand_below():
    text = tables.to_markdown(config(**LADDER), ladder_records())
    assert (
        """
| | epsilon = 1 | epsilon = 3 | epsilon = 8 |
| --- | --- | --- | --- |
| DP-SGD | 50.50 (0.71) | - | 50.50 (0.71) |
| K = 1, half | 60.50 (0.71) | - | 60.50 (0.71) |
| published: Theirs | 40 | 45.0 (.1) | - |
"""
        in text
    )


def test_the_table_for_latex():
    assert tables.to_latex(config(**LADDER), ladder_records()).splitlines() == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r" & epsilon = 1 & epsilon = 3 & epsilon = 8 \\",
        r"\midrule",
        r"DP-SGD & 50.50 (0.71) & - & 50.50 (0.71) \\",
        r"K = 1, half & 60.50 (0.71) & - & 60.50 (0.71) \\",
        r"published: Theirs & 40 & 45.0 (.1) & - \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    odd = config(rows=(("a_b & 5%", {}),), paper=None)
    assert r"a\_b \& 5\% & -" in tables.to_latex(odd, [])


def test_a_csv_gives_the_same_records_and_tables(tmp_path):
    columns = {"epsilon": ("3",), "optimizer": {"learning_rate": (0.5, 1.0)}}
    rows = (*PLAIN, ("16", {"method.name": "self_aug"}))  # a number for a name
    grid = config(rows=rows, columns=columns, paper=None)
    records = [
        record(row, "3", seed, 0.1 + seed / 3)
        | {"optimizer.learning_rate": rate, "note": "no number, with a comma"}
        | {"seconds": 9.5}
        for row in grid.rows
        for rate in (0.5, 1.0)
        for seed in (0, 1)
    ]
    text = tables.write(grid, Workdir(tmp_path), records)
    again = tables.read(grid, tmp_path / "runs.csv")
    assert [dict(line) for line in again] == records
    assert tables.to_markdown(grid, again) == text
    assert (tmp_path / "runs.csv").stat().st_mode & 0o777 == 0o600


def test_a_column_may_hold_none(tmp_path):
    grid = config(
        rows=PLAIN[:1],
        columns={"epsilon": ("3",), "finetune": {"whitening": (None, 0.1)}},
        paper=None,
    )
    records = [
        record("DP-SGD", "3", 0, 0.5) | {"finetune.whitening": value, "seconds": 1.0}
        for value in (None, 0.1)
    ]
    tables.write(grid, Workdir(tmp_path), records)
    assert [dict(r) for r in tables.read(grid, tmp_path / "runs.csv")] == records


def lines_of(axes):
    return {
        bars.get_label(): [line.tolist() for line in bars.lines[0].get_data()]
        for bars in axes.containers
    }


def test_a_ladder_is_drawn_against_its_column_and_against_seconds():
    records = [{**r, "seconds": r["seed"] + 1.0} for r in ladder_records()]
    left, right = plots.draw(config(**LADDER), records).axes
    assert lines_of(left) == {
        "DP-SGD": [[1, 8], [50.5, 50.5]],
        "K = 1, half": [[1, 8], [60.5, 60.5]],
    }
    assert lines_of(right)["DP-SGD"] == [[1.5, 1.5], [50.5, 50.5]]
    (bars,) = left.containers[0].lines[2]
    assert bars.get_segments()[0].tolist() == [[1, 50], [1, 51]]
    (cited,) = (line for line in left.lines if line.get_linestyle() == "--")
    assert [line.tolist() for line in cited.get_data()] == [[1, 3], [40, 45]]
    assert [text.get_text() for text in left.texts] == ["Theirs"]
    assert left.get_xlabel() == "epsilon"
    assert left.get_ylabel() == "test_accuracy_ema in %"


@pytest.mark.parametrize(
    "columns",
    [
        {"epsilon": ("1",)},
        {"epsilon": ("1", "8"), "optimizer": {"momentum": (0.0, 0.5)}},
    ],
)
def test_sweeps_without_a_column_of_numbers_are_drawn_against_seconds(columns):
    records = [{**r, "optimizer.momentum": 0.5} for r in ladder_records()]
    (axes,) = plots.draw(config(columns=columns, paper=None), records).axes
    assert axes.get_xlabel() == "seconds of a run"
    assert set(lines_of(axes)) == {"DP-SGD", "K = 1, half"}


def test_report_writes_what_the_sweep_wrote(tmp_path):
    """A column of the config that the file keeps as text comes back as it was."""
    grid = config(columns={"epsilon": ("1", "8")}, paper=None)
    (tmp_path / "sweep").mkdir()
    tables.write(grid, Workdir(tmp_path / "sweep"), ladder_records())
    (tmp_path / "config.py").write_text(
        "import ml_collections\nfrom tests.test_sweep import SMALL\n"
        "def get_config():\n    return ml_collections.ConfigDict({**SMALL,"
        " 'columns': {'epsilon': ('1', '8')}, 'paper': None})\n"
    )
    flags = [f"--config={tmp_path}/config.py", f"--to={tmp_path}/again"]
    done = call("experiments/report.py", [*flags, f"--runs={tmp_path}/sweep/runs.csv"])
    assert done.returncode == 0, done.stderr
    for name in ("runs.csv", "table.md", "table.tex"):
        written = (tmp_path / "again" / name).read_bytes()
        assert written == (tmp_path / "sweep" / name).read_bytes()
    assert done.stdout == (tmp_path / "sweep/table.md").read_text()
    assert (tmp_path / "again/plot.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "again/plot.pdf").read_bytes()[:4] == b"%PDF"


@pytest.mark.parametrize(
    ("paper", "message"),
    [
        ({"cells": ()}, "paper.source is '': it must be where the cells are printed"),
        (
            {"source": "x", "cell": ()},
            r"paper is \['cell'\]: it must be of keys source",
        ),
        ({"source": "x", "cells": (("a",),)}, r"paper.cells is \('a',\): it must be a"),
        (
            {"source": "x", "cells": (("a", "3", 5.0),)},
            "a row, values of columns and",
        ),
    ],
)
def test_numbers_of_a_paper_fit_the_grid(paper, message):
    with pytest.raises(UserError, match=message):
        config(paper=paper)


HEADER = "row,epsilon,seed,test_accuracy_ema,seconds\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "runs.csv: No such file or directory"),
        ("row,epsilon,seed\nDP-SGD,3,0\n", "runs.csv, line 2: it must be a run of 'Ti"),
        ("row,epsilon,seed,test_accuracy_ema\nOther,3,0,0.5\n", "line 2"),
        ("row,epsilon,seed,test_accuracy_ema\nDP-SGD,4,0,0.5\n", "line 2"),
        ("row,epsilon,seed,test_accuracy_ema\nDP-SGD,3,x,0.5\n", "line 2"),
        ("row,epsilon,seed,test_accuracy_ema\nDP-SGD,3,0,high\n", "line 2"),
        ("row,epsilon,seed,test_accuracy_ema\nDP-SGD\n", "line 2"),
        ("row,epsilon,seed,test_accuracy_ema\nDP-SGD,3,0,0.5\n", "line 2"),  # seconds
        (f"{HEADER}DP-SGD,3,0,0.5,9\nDP-SGD,3,2,0.5,9\n", "line 3"),  # of 2 seeds
        (f"{HEADER}DP-SGD,3,0,0.5,9\nDP-SGD,3,0,0.5,9\n", "line 3"),  # twice
        (HEADER, "it has no runs"),
        ("", "it has no runs"),
        (b"row,epsilon\n\xff\n", "line 2"),
    ],
)
def test_a_file_of_another_sweep_is_refused(tmp_path, text, message):
    path = tmp_path / "runs.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        tables.read(config(), path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
