"""What the benchmark prints and writes, and what it refuses; never how fast it was."""

import json
import math
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.programs import run_each


def benchmark(*args):
    return subprocess.run(
        [sys.executable, ROOT / "experiments/benchmark.py", *args],
        capture_output=True,
        text=True,
    )


def test_it_prints_and_writes_every_row(tmp_path):
    path = tmp_path / "speed.json"
    done = benchmark(
        *("--width=1", "--k=1", "--records=2", "--rounds=2", f"--json={path}"),
        "--methods=non-private,ours,ours:ghost,jax_privacy,torch non-private",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    names = ["non-private", "ours", "ours:ghost", "jax_privacy"]
    if "torch" in result["environment"]["versions"]:
        names.append("torch non-private")
    else:
        assert 'pip install -e ".[peers]"' in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][1:3] == ["x JAX non-private", "x own non-private"]
    assert [line[0] for line in cells[2:]] == names
    assert cells[2][1] == "1.00 (1.00 to 1.00)"
    assert result["environment"]["versions"]["jax"] in done.stdout
    assert [row["name"] for row in result["rows"]] == names
    base = result["rows"][0]["seconds"]
    for row, line in zip(result["rows"], cells[2:], strict=True):
        found = row["ratio_to_jax_nonprivate"]
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        ratios = [a / b for a, b in zip(row["seconds"], base, strict=True)]
        assert found["median"] == pytest.approx(sum(ratios) / 2)
        assert (found["min"], found["max"]) == (min(ratios), max(ratios))
        assert line[1].startswith(f"{found['median']:.2f} (")
        assert math.isclose(
            row["images_per_second"], 2 / row["median_seconds"], rel_tol=1e-9
        )
        assert row["error"] is None
    for name in ("ours", "ours:ghost"):
        assert result["difference_from_jax_privacy"][name] <= 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["speed.json"]


def test_a_mistake_is_one_line():
    mistakes = {
        ("--methods=ours,theirs",): "'theirs'",
        ("--k=0",): "--k=0",
        ("--json=nowhere/speed.json",): "nowhere/speed.json",
        ("--dpmix_over_self_aug", "--k=2"): "--k",
    }
    done = run_each("experiments/benchmark.py", list(mistakes))
    for shown, named in zip(done, mistakes.values(), strict=True):
        assert shown.returncode == 2
        assert shown.stderr.startswith("error: ")
        assert shown.stderr.count("\n") == 1
        assert named in shown.stderr
        assert not shown.stdout


@pytest.mark.slow
def test_table13_prints_and_writes_every_method(tmp_path):
    path, tiny = tmp_path / "table13.json", {"depth": 1, "width": 32, "heads": 2}
    flags = [f"--config.model.{key}={value}" for key, value in tiny.items()]
    config = "--config=configs/vit_b16.py:caltech256-2"
    measured, refused, unknown = run_each(
        "experiments/table13.py",
        [
            [config, *flags, "--records=1", "--rounds=2", f"--json={path}"],
            [config, "--json=nowhere/table13.json"],
            [config, "--config.model.dept=1"],
        ],
    )
    assert measured.returncode == 0, measured.stderr
    result = json.loads(path.read_text())
    assert [row["k"] for row in result["rows"]] == [16, 34, 36]
    assert "vit, 224x224x3, 257 classes, trainable head, float32" in measured.stdout
    first, *_ = rows = result["rows"]
    for row in rows:
        assert len(row["seconds"]) == len(row["forward_seconds"]) == 2
        pairs = zip(row["seconds"], first["seconds"], strict=True)
        ratios = [a / b for a, b in pairs]
        assert row["ratio_to_self_aug"]["median"] == pytest.approx(sum(ratios) / 2)
        assert f"| {row['name']} | {ratio(row['ratio_to_self_aug'])} |" in (
            measured.stdout
        )
        seconds = sum(row["seconds"]) / 2
        assert row["images_per_second"] == pytest.approx(row["k"] / seconds)
        assert row["hours"] == pytest.approx(245 * 1000 * seconds / 3600)
    for shown, named in ((refused, "nowhere/table13.json"), (unknown, "model.dept")):
        assert shown.returncode == 2
        assert shown.stderr.startswith("error: ")
        assert named in shown.stderr
        assert shown.stderr.count("\n") == 1


def ratio(found):
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"
