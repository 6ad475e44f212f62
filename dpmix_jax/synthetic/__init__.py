"""Public synthetic images: banks for DP-Mix_diff, made without any private record.

bank        which image gets which class and seed; writing, resuming, the manifest
diffusion   a generator: Stable Diffusion through diffusers, extra `diffusion`
render      a generator: digits drawn from fonts, which needs no model
"""

from dpmix_jax.synthetic.bank import Generator, Plan, Wanted, fill

__all__ = ["Generator", "Plan", "Wanted", "fill"]
