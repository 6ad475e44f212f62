"""Every fault of `tests/faults.py` is caught by the test that it names.

DPMIX_JAX_FAULTS=all plants all of them, as a release asks for; without it, every third.
"""

import os

import pytest

from tests import faults
from tests.conftest import ROOT

EVERY = 1 if os.environ.get("DPMIX_JAX_FAULTS") == "all" else 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return faults.copy(tmp_path_factory.mktemp("package"))


@pytest.mark.slow
@pytest.mark.parametrize("title", list(faults.FAULTS)[::EVERY])
def test_a_planted_fault_is_caught(folder, title):
    assert faults.is_caught(faults.FAULTS[title], folder)


@pytest.mark.parametrize("title", faults.FAULTS)
def test_a_fault_changes_the_file_that_it_names(title):
    fault = faults.FAULTS[title]
    text = (ROOT / "dpmix_jax" / fault.path).read_text()
    assert fault.planted(text) != text
    name = fault.test.split("::")[-1].split("[")[0]
    assert name in (ROOT / "tests" / fault.test.split("::")[0]).read_text()


def test_a_fault_that_is_not_there_is_not_planted():
    fault = faults.Fault("privacy.py", (("no such line", ""),), "test_privacy.py")
    with pytest.raises(ValueError, match=r"privacy\.py has no 'no such line'"):
        fault.planted("")
