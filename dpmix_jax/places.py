"""Where datasets are looked for and where caches are kept."""

import os
import pathlib


def cache_folder() -> pathlib.Path:
    """Returns `DPMIX_JAX_CACHE`, by default `~/.cache/dpmix_jax`."""
    named = os.environ.get("DPMIX_JAX_CACHE")
    return pathlib.Path(named or pathlib.Path.home() / ".cache" / "dpmix_jax")


def data_folder() -> pathlib.Path:
    """Returns `DPMIX_JAX_DATA`, by default `~/dpmix_data`."""
    named = os.environ.get("DPMIX_JAX_DATA")
    return pathlib.Path(named or pathlib.Path.home() / "dpmix_data")
