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
