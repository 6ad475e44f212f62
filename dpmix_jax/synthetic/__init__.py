"""Public synthetic images: banks for DP-Mix_diff, made without any private record.

plan        which image gets which class and seed
bank        writing them, resuming, the manifest
diffusion   a generator: Stable Diffusion through diffusers, extra `diffusion`
domain_gap  how far a bank is from a dataset: `experiments/domain_gap.py`

`data.rendered.Render` is a generator too: digits and clothes, drawn without a model.
"""

from dpmix_jax.synthetic.bank import Generator, fill
from dpmix_jax.synthetic.plan import Plan, Wanted

__all__ = ["Generator", "Plan", "Wanted", "fill"]
