"""Strict numerics for every test: no silent dtype or rank promotion."""

import os
import pathlib

# Most of a test's time is LLVM's, whose later passes change rounding only. Set before
# jax is imported; tests/test_experiment.py runs programs as users do, without it.
os.environ.setdefault("USERS_XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
os.environ["XLA_FLAGS"] = (
    os.environ["USERS_XLA_FLAGS"] + " --xla_backend_optimization_level=1"
)

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


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Keeps tests out of the user's caches; programs they start share compiled code.

    JAX has read its environment by now, so nothing changes in this process.
    """
    os.environ["DPMIX_JAX_CACHE"] = str(tmp_path_factory.mktemp("accounting"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
