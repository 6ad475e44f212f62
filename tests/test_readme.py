"""What the README says is run as it stands."""

import re
import tomllib

import pytest

import dpmix_jax
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.sampled
def test_the_library_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert (ROOT / "examples/minimal.py").read_text().endswith(f'"""\n\n{code}')
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert capsys.readouterr().out == "(3.000, 1e-05)-DP\n"
    predicted = (
        scope["images"].reshape(len(scope["train"]), -1) @ scope["params"]
    ).argmax(axis=1)
    assert (predicted == scope["train"].labels).mean() > 0.8


def test_the_test_command_is_what_ci_runs():
    command = 'pip install -e ".[test]" && pytest'
    assert command in README
    quiet = "pip install --quiet --disable-pip-version-check -e"
    assert command.replace("pip install -e", quiet) in (ROOT / ".ci/run").read_text()


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    for page in pages:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_programs_and_configs_that_are_named_exist():
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for name in re.findall(r"(?:experiments|configs)/\w+\.py", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dpmix_jax.__version__ == project["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == project["version"]


def test_pre_commit_lints_by_the_version_that_ci_has():
    (pinned,) = re.findall(
        r"^ruff==(.*)$", (ROOT / "requirements.txt").read_text(), re.M
    )
    assert f"rev: v{pinned} " in (ROOT / ".pre-commit-config.yaml").read_text()
