"""Imports point one way: the core knows no wing, a wing neither `run` nor `sweeps`."""

import ast
import graphlib

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "dpmix_jax"
CORE = [
    *("augment", "pool", "mixup", "conv", "tuning", "ghost", "gradients", "privacy"),
    *("selection", "sampling", "allocation", "training", "devices", "noise", "audit"),
    *("accounting", "factorization", "optimizers"),
]
WINGS = ("baselines", "data", "models", "synthetic")
ABOVE = ("run", "sweeps")
# Who may not import what, by the first parts of names.
REFUSED = {
    **dict.fromkeys(CORE, ("flax", "ml_collections", *WINGS, *ABOVE)),
    **dict.fromkeys(WINGS, ABOVE),
    "data": (*ABOVE, "synthetic"),
    "run": ("sweeps",),
}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name):
    """The modules that a module imports, wherever in it; of ours the whole names."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative name"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = whole & MODULES.keys()
            # `from package import module` needs the module, not all of the package.
            found |= ours if whole == ours else {*ours, node.module}
    return found


def part_of(name):
    """`dpmix_jax.run.build` -> run; of others the library."""
    parts = name.split(".")
    return parts[1] if parts[0] == "dpmix_jax" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("part", REFUSED)
def test_none_points_upward(part):
    names = [name for name in MODULES if part_of(name) == part]
    if part in CORE:
        assert names
    wrong = {
        (name, imported)
        for name in names
        for imported in imports(name)
        if part_of(imported) in REFUSED[part] or imported == "dpmix_jax"
    }
    assert wrong == set()


def test_there_are_no_circles():
    graph = {name: imports(name) & MODULES.keys() for name in MODULES}
    assert graph["dpmix_jax.training"] >= {"dpmix_jax.devices", "dpmix_jax.mixup"}
    graphlib.TopologicalSorter(graph).prepare()  # raises, and names one
