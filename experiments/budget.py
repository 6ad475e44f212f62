"""Tells what all runs on a dataset have spent together, and declares their budget.

    python experiments/budget.py --config=configs/digits.py
    python experiments/budget.py --config=configs/digits.py --declare=8

A run that would exceed a declared budget is refused before it starts. The ledger is in
`DPMIX_JAX_LEDGER`, by default `~/.local/state/dpmix_jax/ledger`; it knows the runs that
began on this machine, whichever way their records were split into training and
validation, or labelled. The same records at another `data.image_size`, or half of them
by `data.half`, have a ledger and a budget of their own: declare it for each.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from absl import flags

from dpmix_jax import data
from dpmix_jax.run import cli, config, ledger

_CONFIG = cli.define_config()
_DECLARE = flags.DEFINE_float("declare", None, "Epsilon of all runs together.", 0.0)
_DELTA = flags.DEFINE_float("delta", 1e-5, "Delta of all runs together.", 0.0, 1.0)
cli.define_dry_run()


def main() -> None:
    cli.config_file()
    of = config.from_config_dict(_CONFIG.value).data
    budget = f", and declare that all may spend epsilon {_DECLARE.value}"
    if cli.would(
        f"tell what all runs on {of.name} have spent"
        + budget * (_DECLARE.value is not None)
    ):
        return
    found = ledger.of(data.load(of))
    if _DECLARE.value is not None:
        found.declare(_DECLARE.value, _DELTA.value)
    print(found.table(_DELTA.value))


if __name__ == "__main__":
    cli.start(main, check=config.check_flags)
