"""Examples run as they stand, and learn."""

import re
import runpy
import warnings

import jax
import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "examples"
NAMES = {path.stem for path in FOLDER.glob("*.py")} - {"loop"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NAMES - {"minimal"}))  # which the README has
def test_an_example_trains_privately(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    with (
        jax.numpy_dtype_promotion("standard"),  # model libraries rely on it
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # theirs
        runpy.run_path(str(FOLDER / f"{name}.py"))
    said = capsys.readouterr().out
    promise, accuracy = said.splitlines()
    plan = "(3, 1e-05)-DP, replace_special"
    assert promise == (plan if name == "jax_privacy_plan" else "3.000-DP")
    assert float(re.fullmatch(r"test accuracy (.*) %", accuracy)[1]) > 80


def test_an_example_is_short():
    assert len(NAMES) >= 7
    for name in NAMES:
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 60
