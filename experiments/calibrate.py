"""Tells how much noise a budget takes, or what noise has spent, in seconds.

    python experiments/calibrate.py --epsilon=3 --n=60000 --batch=4096 --updates=1000
    python experiments/calibrate.py --sigma=2.5 --n=60000 --batch=4096 --updates=1000

No data are touched. With --epsilon it also tells sigma at other batches and updates, by
RDP, which is quick and asks for a little more noise than PLD; --plot draws them. The
noise on the mean gradient is sigma / B, in units of the sensitivity of the sum: of two
settings with the same, the one with fewer updates is the cheaper.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import pathlib

from absl import flags

from dpmix_jax.accounting import RELATIONS
from dpmix_jax.errors import UserError, require
from dpmix_jax.run import calibration, cli

_EPSILON = flags.DEFINE_float("epsilon", None, "The budget.")
_SIGMA = flags.DEFINE_float("sigma", None, "Noise multiplier, in place of --epsilon.")
_DELTA = flags.DEFINE_float("delta", 1e-5, "Of the budget.")
_N = flags.DEFINE_integer("n", None, "Training records.", required=True)
_BATCH = flags.DEFINE_float("batch", None, "Expected batch size B.", required=True)
_UPDATES = flags.DEFINE_integer("updates", None, "Updates T.", required=True)
_RELATION = flags.DEFINE_enum(
    "relation", "add_or_remove_one", list(RELATIONS), "Which datasets are neighbours."
)
_PLOT = flags.DEFINE_string("plot", None, "PNG file to draw the trade-offs into.")
cli.define_dry_run()


def main() -> None:
    epsilon, sigma = _EPSILON.value, _SIGMA.value
    if (epsilon is None) == (sigma is None):
        raise UserError("give one of --epsilon and --sigma")
    setting = calibration.Setting(
        num_records=_N.value,
        batch_size=_BATCH.value,
        num_updates=_UPDATES.value,
        delta=_DELTA.value,
        relation=RELATIONS[_RELATION.value],
    )
    if sigma is not None and _PLOT.value:
        raise UserError("--plot is for --epsilon")
    if _PLOT.value and _RELATION.value == "replace_one":
        raise UserError("--relation is replace_one: RDP tells no trade-offs to --plot")
    name, value = ("sigma", sigma) if epsilon is None else ("epsilon", epsilon)
    require(bool(value and value > 0), f"--{name}", value, "positive")
    asked = f"{'epsilon' if epsilon is None else 'sigma'} for {name} {value}"
    if cli.would(
        f"tell {asked}, delta {_DELTA.value:g}, {_UPDATES.value:,} updates of"
        f" {_BATCH.value:g} of {_N.value:,} records"
        + f", and draw trade-offs into {_PLOT.value}"
        * bool(_PLOT.value)
    ):
        return
    if sigma is not None:
        print(calibration.spent(setting, sigma))
    if epsilon is not None:
        print(calibration.needed(setting, epsilon))
        others = calibration.trade_offs(setting, epsilon)
        if others:
            print(calibration.table(others))
        if _PLOT.value:
            calibration.draw(others, pathlib.Path(_PLOT.value))


if __name__ == "__main__":
    cli.start(main)
