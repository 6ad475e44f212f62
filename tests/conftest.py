"""Strict numerics for every test: no silent dtype or rank promotion."""

import os
import pathlib

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
def accounting_cache(tmp_path_factory):
    """Keeps calibrations of the tests out of the user's cache."""
    folder = tmp_path_factory.mktemp("accounting")
    os.environ["DPMIX_JAX_CACHE"] = str(folder)
    return folder
