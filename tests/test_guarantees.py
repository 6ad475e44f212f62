"""Every line of a `Formal guarantees:` section is named by a test that proves it."""

import importlib
import inspect
import pkgutil
import re

import dpmix_jax
from tests.conftest import ROOT


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


def test_each_fast_case_is_there(request):
    """A case that is misspelt would be slow, and nobody would see it."""
    named, found = set(), set()
    for item in request.session.items:
        if fast := item.get_closest_marker("fast"):
            test = item.nodeid.split("[")[0]
            named |= {(test, case) for case in fast.args}
            found.add((test, item.callspec.id))
    assert named - found == set()


def test_each_guarantee_is_proven_and_nothing_else_is_claimed():
    assert len(promised()) >= 20
    assert promised() - proven() == set()
    assert proven() - promised() == set()
