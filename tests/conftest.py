"""Strict numerics for every test: no silent dtype or rank promotion."""

import os
import pathlib
import tempfile

# Much of a test's time is LLVM's, whose passes change rounding only, and what is
# compiled once is kept for all tests of a session, processes and workers among them.
# Both are set before jax is imported.
os.environ.setdefault("USERS_XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
os.environ["XLA_FLAGS"] = (
    os.environ["USERS_XLA_FLAGS"] + " --xla_backend_optimization_level=0"
)
if "PYTEST_XDIST_WORKER" not in os.environ:
    KEPT = tempfile.TemporaryDirectory(prefix="dpmix_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{KEPT.name}/compiled"
    os.environ["DPMIX_JAX_CACHE"] = f"{KEPT.name}/accounting"
    os.environ["DPMIX_JAX_LEDGER"] = f"{KEPT.name}/ledger"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "default", derandomize=True, deadline=None, max_examples=25, database=None
)
hypothesis.settings.load_profile("default")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).parent.parent


COLLECTED = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks as slow all cases of a sampled test but those that its mark names.

    Where more than the default is wanted, `unsampled` tells them from cases that are
    slow by themselves.
    """
    config.stash[COLLECTED] = [*items]
    for item in items:
        sampled = item.get_closest_marker("sampled")
        left_out = sampled and case(item) not in sampled.args
        if left_out and not item.get_closest_marker("slow"):
            item.add_marker("slow")
            item.add_marker("unsampled")


def case(item) -> str | None:
    """Returns the id of a test's case, None for a test of one."""
    return item.callspec.id if hasattr(item, "callspec") else None


@pytest.fixture
def as_on_accelerators(monkeypatch):
    """Computes on this machine what is chosen for accelerators."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args)
    )
