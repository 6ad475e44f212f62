"""Grids of runs over paired seeds, and private selections among their points.

grid        a sweep's config: which runs there are
launch      does them one after another, and goes on after a stop
processes   each in a process of its own
tables      what came out: CSV, tables, settings chosen
"""

from dpmix_jax.sweeps.grid import from_config_dict
from dpmix_jax.sweeps.launch import launch

__all__ = ["from_config_dict", "launch"]
