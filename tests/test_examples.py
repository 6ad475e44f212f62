"""Examples run as they stand, and learn."""

import json
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
    promises, accuracies = said.splitlines()[::2], said.splitlines()[1::2]
    assert promises == {
        "jax_privacy_plan": ["(3, 1e-05)-DP, replace_special"],
        "least_squares": [f"({n}.000, 1e-05)-DP" for n in (1, 3, 8)],
    }.get(name, ["(3.000, 1e-05)-DP"])
    for accuracy in accuracies:
        assert float(re.fullmatch(r"test accuracy (.*) %", accuracy)[1]) > 80
    assert len(accuracies) == len(promises)


def test_an_example_is_short():
    assert len(NAMES) >= 7
    for name in NAMES:
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 60


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """Its code as it stands; what was printed when it was made is in it."""
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in [*cell["source"], "\n"]]
    code = "".join(line for line in lines if not line.startswith("%"))
    code = code.replace("from IPython.display import Markdown\n", "Markdown = print\n")
    every = '"--config.logging.log_every=40"'
    assert every in code
    fewer = f'{every}, "--config.privacy.num_updates=30"'  # of 160, for the time
    code = code.replace(every, fewer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    with (
        jax.numpy_dtype_promotion("standard"),  # as users have it
        jax.numpy_rank_promotion("allow"),
    ):
        exec(compile(code, "quickstart", "exec"), {})
    said = capsys.readouterr().out
    assert "(3.000, 1e-05)-DP" in said
    assert "differentially private" in " ".join(said.split())
    accuracies = re.findall(r"([\d.]+)% of test images", said)
    assert len(accuracies) == 2
    assert min(map(float, accuracies)) > 80
    assert all(cell["outputs"] for cell in cells[1:])
