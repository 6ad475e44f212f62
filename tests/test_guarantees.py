"""Every line of a `Formal guarantees:` section is named by a test that proves it."""

import importlib
import inspect
import pkgutil
import re

import pytest

import dpmix_jax
from tests.conftest import COLLECTED, ROOT, case


def promised():
    """{("module.function", line number)} of all bullets, from 1."""
    found = set()
    for info in pkgutil.walk_packages(dpmix_jax.__path__, "dpmix_jax."):
        module = importlib.import_module(info.name)
        for name, member in vars(module).items():
            if getattr(member, "__module__", None) != info.name:
                continue
            text = inspect.getdoc(member) or ""
            section = re.search(r"Formal guarantees.*:\n((?:  .*\n|\n)+)", text + "\n")
            bullets = re.findall(r"^  - ", section[1], re.MULTILINE) if section else []
            short = f"{info.name.removeprefix('dpmix_jax.')}.{name}"
            found |= {(short, i + 1) for i in range(len(bullets))}
    return found


def proven():
    """The same, of `proves` marks in the tests."""
    mark = re.compile(r'^@pytest\.mark\.proves\("([\w.]+)", ([\d, ]+)\)$', re.MULTILINE)
    return {
        (name, int(line))
        for path in (ROOT / "tests").glob("test_*.py")
        for name, lines in mark.findall(path.read_text())
        for line in lines.split(",")
    }


@pytest.fixture
def collected(request):
    """Tests of this session, before slow ones were left out."""
    if request.config.args != request.config.getini("testpaths"):
        pytest.skip("some files or tests were asked for")
    return request.config.stash[COLLECTED]


def test_each_sampled_case_is_there(collected):
    """A case that is misspelt would be slow, and nobody would see it."""
    named, found = set(), set()
    for item in collected:
        if sampled := item.get_closest_marker("sampled"):
            test = item.nodeid.split("[")[0]
            named |= {(test, name) for name in sampled.args}
            found.add((test, case(item)))
    assert found
    assert named - found == set()


def test_each_guarantee_is_proven_by_default(collected):
    """By a test that is not slow, if all files with proofs are collected."""
    tests = (ROOT / "tests").glob("test_*.py")
    proofs = {path for path in tests if "@pytest.mark.proves" in path.read_text()}
    if not proofs <= {item.path for item in collected}:
        pytest.skip("not all files were asked for")
    always, all_of_them = set(), set()
    for item in collected:
        for mark in item.iter_markers("proves"):
            lines = {(mark.args[0], line) for line in mark.args[1:]}
            all_of_them |= lines
            always |= set() if item.get_closest_marker("slow") else lines
    assert all_of_them - always == set()


def test_each_guarantee_is_proven_and_nothing_else_is_claimed():
    assert len(promised()) >= 20
    assert promised() - proven() == set()
    assert proven() - promised() == set()
