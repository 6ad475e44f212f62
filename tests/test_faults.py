"""Every fault of `tests/faults.py` is caught by the test that it names."""

import pytest

from tests import faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return faults.copy(tmp_path_factory.mktemp("package"))


@pytest.mark.slow
@pytest.mark.parametrize("title", faults.FAULTS)
def test_a_planted_fault_is_caught(folder, title):
    assert faults.is_caught(faults.FAULTS[title], folder)


def test_a_fault_that_is_not_there_is_not_planted(folder):
    fault = faults.Fault("privacy.py", (("no such line", ""),), "test_privacy.py")
    with pytest.raises(ValueError, match=r"privacy\.py has no 'no such line'"):
        faults.is_caught(fault, folder)
