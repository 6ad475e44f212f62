"""Grids of runs over paired seeds, and private selections among their points.

grid        a sweep's config: which runs there are
costs       what they would take, and what is missing
launch      does them, and goes on after a stop
worker      one after another, in a process that may die with a run
cluster     or as jobs, on this machine or a cluster
watch       shows how far they are
tables      what came out: CSV, tables, settings chosen
plots       and drawn
"""

from dpmix_jax.sweeps.costs import sheet
from dpmix_jax.sweeps.grid import from_config_dict
from dpmix_jax.sweeps.launch import launch
from dpmix_jax.sweeps.watch import watch
from dpmix_jax.sweeps.worker import Worker

__all__ = ["Worker", "from_config_dict", "launch", "sheet", "watch"]
