"""What a sweep would cost, before anything starts."""

import re

import pytest

from configs._base import method
from dpmix_jax import UserError
from dpmix_jax.run.config import from_config_dict, to_dict
from dpmix_jax.run.dry_run import seconds_an_update
from dpmix_jax.sweeps import costs, sheet
from tests import runs
from tests.programs import call
from tests.test_sweep import ROOT, config


def test_a_sheet_tells_updates_images_and_hours(monkeypatch):
    """Cells whose updates take the same time are timed once."""
    timed = []

    def seconds(of):
        timed.append(of.method.name)
        return 3.6

    monkeypatch.setattr(costs, "seconds_an_update", seconds)
    rows = (
        ("DP-SGD", method("dp_sgd")),
        ("Views", method("self_aug", k_base=2)),
    )
    common = {"privacy": {"expected_batch_size": 100}}
    grid = config(rows=rows, columns={"epsilon": ("3", "8")}, common=common, paper=None)
    assert (
        sheet(grid)
        == """\
| row | column | runs | updates | images a run | hours a run |
| --- | --- | --- | --- | --- | --- |
| DP-SGD | epsilon = 3 | 2 | 100 | 10,000 | 0.1 |
| DP-SGD | epsilon = 8 | 2 | 160 | 16,000 | 0.16 |
| Views | epsilon = 3 | 2 | 100 | 20,000 | 0.1 |
| Views | epsilon = 8 | 2 | 160 | 32,000 | 0.16 |

8 runs, 1 hours of updates
"""
    )
    assert timed == ["dp_sgd", "self_aug"]


def test_what_is_missing_is_told_with_what_gets_it(monkeypatch, tmp_path):
    """And the rest is told all the same: nothing of those cells is timed."""
    monkeypatch.setenv("DPMIX_JAX_DATA", str(tmp_path))
    common = {
        "data": {"name": "cifar10"},
        "finetune": {"weights": "w.safetensors"},
        "public": {"name": "bank", "path": "no-bank"},
        "method": {"name": "dp_mix_diff"},
    }
    grid = config(common=common, rows=(("Mixed", {}),), paper=None)
    *_, cell, _, total, data, public, weights = sheet(grid).splitlines()
    assert cell == "| Mixed | epsilon = 3 | 2 | 100 | 256,000 | - |"
    assert total == "2 runs, 0 hours of updates, without the cells that lack files"
    assert re.match("missing: data.path is None: cifar10 is not in .* fetches it", data)
    assert public.startswith("missing: public.path is no-bank: cannot be read")
    assert weights.startswith("missing: finetune.weights is w.safetensors: there is no")


def test_a_path_is_told_as_it_is(monkeypatch):
    monkeypatch.setattr(costs, "seconds_an_update", lambda config: 1.0)
    common = {"public": {"name": "npz", "path": "/no/mydata.d/data.npz"}}
    common |= {"method": {"name": "dp_mix_diff"}, "data": {"name": "digits"}}
    told = sheet(config(common=common, rows=(("One", {}),), paper=None))
    assert "missing: public.path is /no/mydata.d/data.npz: " in told


def test_what_will_be_fetched_is_not_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("DPMIX_JAX_DATA", str(tmp_path))
    monkeypatch.setattr(costs, "seconds_an_update", lambda config: 3.6)
    common = {
        "data": {"name": "cifar10", "download": True},
        "public": {"name": "cifar100", "download": True},
        "method": {"name": "dp_mix_diff"},
        "finetune": {"weights": __file__},
    }
    grid = config(common=common, rows=(("Plain", {}),), paper=None)
    *_, cell, _, total = sheet(grid).splitlines()
    assert cell.endswith("| 0.1 |")
    assert total == "2 runs, 0.2 hours of updates"


def test_a_private_selection_has_no_sheet():
    selection = {"selection": "geometric", "expected_candidates": 4.0}
    common = {"privacy": selection, "data": {"validation_size": 100}}
    with pytest.raises(UserError, match="nothing of a private selection"):
        sheet(config(common=common, rows=(("One", {}),), paper=None))


def test_the_program_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "seconds_an_update", lambda config: 1.0)
    flags = [f"--config={ROOT}/configs/table11.py:digits", f"--workdir={tmp_path}/runs"]
    done = call("experiments/sweep.py", [*flags, "--dry_run"])
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\| epsilon = [18] \| 5 \|", done.stdout)) == 6
    assert re.search(r"^30 runs, [\d.]+ hours of updates$", done.stdout, re.MULTILINE)
    assert not [*tmp_path.iterdir()]


@pytest.mark.sampled
def test_an_update_is_timed_on_blank_images(monkeypatch):
    """Of a run on kept embeddings the update is what comes after the embedding."""
    values = to_dict(runs.config()) | {
        "model": {"name": "scattering_linear", "scales": 1},
        "finetune": {"embeddings": "kept"},
        "method": {"name": "dp_sgd"},
    }
    monkeypatch.setattr("dpmix_jax.models.kept.keep", None)  # nothing is embedded
    assert 1e-5 < seconds_an_update(from_config_dict(values)) < 60
