"""What the benchmarks print and write, and what they refuse; never how fast it was."""

import json
import runpy

import jax
import numpy as np
import pytest
from absl import flags

from tests.conftest import ROOT
from tests.programs import call, forgotten_flags

SCRIPT = "experiments/benchmark.py"
TINY = ("--depth=10", "--width=1", "--k=1", "--records=2", "--rounds=2")


def ratio(found):
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def check_ratio(found, seconds, base):
    """Two rounds: the median is the mean."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    assert found["median"] == pytest.approx(sum(ratios) / 2)
    assert (found["min"], found["max"]) == (min(ratios), max(ratios))


def test_every_row_is_printed_and_written(tmp_path):
    path = tmp_path / "speed.json"
    done = call(SCRIPT, ["--cnn", *TINY, "--methods=ours", f"--json={path}"])
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["workload"].startswith("CNN of 16 and 32 channels, 28x28x1, float32")
    assert result["environment"]["XLA_FLAGS"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][1:4] == ["K", "x JAX non-private", "x own non-private"]
    assert [line[:2] for line in cells[2:]] == [
        ["non-private", "1"],
        ["ours", "1"],
        ["jax_privacy", "1"],
    ]
    assert cells[2][2] == "1.00 (1.00 to 1.00)"
    assert f"jax {result['environment']['jax']}" in done.stdout
    assert [row["name"] for row in result["rows"]] == [line[0] for line in cells[2:]]
    base = result["rows"][0]["seconds"]
    for row, line in zip(result["rows"], cells[2:], strict=True):
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        check_ratio(row["ratio_to_jax_nonprivate"], row["seconds"], base)
        assert line[2] == ratio(row["ratio_to_jax_nonprivate"])
        assert row["images_per_second"] == pytest.approx(2 / row["median_seconds"])
        assert row["error"] is None
    assert result["rows"][1]["difference_from_jax_privacy"] <= 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["speed.json"]


@pytest.mark.parametrize(
    ("gap", "by_rounding", "is_right"),
    [
        (5e-6, None, True),  # nothing more is computed
        (1e-3, 2e-3, True),  # a ReLU may have turned
        (1e-3, 1e-6, False),
        (1e-3, np.nan, False),
        (2e-2, 1.0, False),
        (np.nan, 2e-3, False),
    ],
)
def test_a_sum_may_differ_as_much_as_rounding_turns_it(
    monkeypatch, capsys, gap, by_rounding, is_right
):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    with forgotten_flags():
        program = runpy.run_path(str(ROOT / SCRIPT))
        flags.FLAGS([SCRIPT])

        def row(name, gap, otherwise=None):
            output = np.float32([1, gap])
            return program["Row"](
                name=name, k=1, call=None, output=output, otherwise=otherwise
            )

        again = by_rounding and (lambda: row("one by one", by_rounding))
        ours, peer = row("ours", gap), row("jax_privacy", 0, again)
        if is_right:
            program["check"]([ours, peer])
            assert ours.difference == pytest.approx(gap)
            assert bool(by_rounding) == ("by 2.0e-03" in capsys.readouterr().out)
        else:
            with pytest.raises(SystemExit, match="ours differs from jax_privacy by"):
                program["check"]([ours, peer])


def test_a_sum_is_rounded_otherwise_one_record_at_a_time(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    with forgotten_flags():
        program = runpy.run_path(str(ROOT / SCRIPT))
        flags.FLAGS([SCRIPT, "--head=20", "--records=4"])
        with jax.numpy_dtype_promotion("standard"):  # jax_privacy's
            (row,) = program["make_rows"](["jax_privacy"], 2)
            again = row.otherwise()
    np.testing.assert_allclose(
        *(r.output["params"]["kernel"] for r in (row, again)), rtol=1e-5, atol=1e-7
    )
    assert again.name == "jax_privacy, one record at a time"


@pytest.mark.sampled
def test_a_head_is_timed(tmp_path):
    path = tmp_path / "head.json"
    flags = ("--head=20", "--k=2", "--records=4", "--rounds=2", f"--json={path}")
    done = call(SCRIPT, flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["workload"].startswith("linear head, 20 x 10, float32, 4 records x 2")
    (head,) = (row for row in result["rows"] if row["name"] == "ours:head")
    assert head["difference_from_jax_privacy"] <= 1e-5
    assert head["ratio_to_jax_nonprivate"]["min"] > 0
    assert head["peak_bytes"] > 0


@pytest.mark.slow
def test_two_k_are_compared_and_operations_named(tmp_path):
    path = tmp_path / "speed.json"
    methods = "--methods=ours,Opacus ghost,K-averaged hooks"
    options = (*TINY, "--k=3", "--profile", f"--json={path}")
    done = call(SCRIPT, [methods, *options])
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert {row["k"] for row in result["rows"]} == {1, 3}
    (found,) = result["ratios_to_least_k"]
    assert f"ours, K = 3 over 1: {ratio(found)} for 3 times the images" in done.stdout
    assert result["profile"][0][1] >= result["profile"][-1][1] > 0
    with_torch = {"torch", "opacus"} <= {*result["environment"]}
    assert with_torch == any(row["name"] == "Opacus ghost" for row in result["rows"])
    assert with_torch or 'pip install -e ".[peers]"' in done.stdout
    assert not [row for row in result["rows"] if row["error"]]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--methods=ours,theirs",), "'theirs'"),
        (("--k=0",), "--k"),
        (("--depth=12",), "--depth is 12: it must be 6 n + 4"),
        (("--json=nowhere/speed.json",), "nowhere/speed.json"),
        (("fast",), "fast is not a flag"),
    ],
)
def test_a_mistake_is_one_line(flags, named):
    done = call(SCRIPT, flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert named in done.stderr


@pytest.mark.slow
def test_table13_prints_and_writes_every_method(tmp_path):
    path, tiny = tmp_path / "table13.json", {"depth": 1, "width": 32, "heads": 2}
    flags = [f"--config.model.{key}={value}" for key, value in tiny.items()]
    config = "--config=configs/vit_b16.py:caltech256-2"
    script, options = "experiments/table13.py", ("--records=1", "--rounds=2")
    measured = call(script, [config, *flags, *options, f"--json={path}"])
    assert measured.returncode == 0, measured.stderr
    assert "vit, 224x224x3, 257 classes, trainable head, float32" in measured.stdout
    rows = json.loads(path.read_text())["rows"]
    assert [row["k"] for row in rows] == [16, 34, 36]
    for row in rows:
        assert len(row["seconds"]) == len(row["forward_seconds"]) == 2
        check_ratio(row["ratio_to_self_aug"], row["seconds"], rows[0]["seconds"])
        line = f"| {row['name']} | {ratio(row['ratio_to_self_aug'])} |"
        assert line in measured.stdout
        seconds = sum(row["seconds"]) / 2
        assert row["images_per_second"] == pytest.approx(row["k"] / seconds)
        assert row["hours"] == pytest.approx(245 * 1000 * seconds / 3600)
    for mistake in ("--json=nowhere/table13.json", "--config.model.dept=1"):
        refused = call(script, [config, mistake])
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: ")
        assert refused.stderr.count("\n") == 1
        assert mistake.split("=")[0].removeprefix("--config.") in refused.stderr
