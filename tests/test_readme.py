"""What the README says is run as it stands."""

import re

from tests.conftest import ROOT


def test_the_library_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert capsys.readouterr().out == "3.000-DP\n"
    predicted = (
        scope["images"].reshape(len(scope["train"]), -1) @ scope["params"]
    ).argmax(axis=1)
    assert (predicted == scope["train"].labels).mean() > 0.8


def test_the_test_command_is_what_ci_runs():
    command = 'pip install -e ".[test]" && pytest'
    assert command in (ROOT / "README.md").read_text()
    quiet = "pip install --quiet --disable-pip-version-check -e"
    assert command.replace("pip install -e", quiet) in (ROOT / ".ci/run").read_text()
