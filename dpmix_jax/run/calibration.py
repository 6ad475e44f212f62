"""Noise against epsilon, batch size and updates, without any data."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import matplotlib.figure

from dpmix_jax.accounting import (
    Mechanism,
    NeighboringRelation,
    calibrate,
    noise_by_rdp,
)
from dpmix_jax.errors import UserError, require
from dpmix_jax.files import replacing
from dpmix_jax.run.statement import round_up

_OF_BATCH, _OF_UPDATES = (0.25, 1, 4), (0.25, 0.5, 1, 2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a budget is spent on.

    Attributes:
      num_records: N.
      batch_size: B, expected.
      num_updates: T.
      delta: of the budget.
      relation: which datasets count as neighbours.
    """

    num_records: int
    batch_size: float
    num_updates: int
    delta: float = 1e-5
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE

    def __post_init__(self):
        most = self.num_records
        require(most >= 1, "--n", most, "at least 1")
        fits = 0 < self.batch_size <= most
        require(fits, "--batch", self.batch_size, f"positive and at most {most}")
        require(self.num_updates >= 1, "--updates", self.num_updates, "at least 1")
        require(0 < self.delta < 1, "--delta", self.delta, "in (0, 1)")

    def mechanism(self, noise_multiplier: float) -> Mechanism:
        return Mechanism(
            sampling_prob=self.batch_size / self.num_records,
            num_updates=self.num_updates,
            noise_multiplier=noise_multiplier,
            neighboring_relation=self.relation,
        )


def spent(setting: Setting, noise_multiplier: float) -> str:
    """Says what this noise spends, by both accountants.

    Args:
      setting: of the run.
      noise_multiplier: sigma, positive.
    """
    fits = 0.125 <= noise_multiplier <= 2**14
    require(fits, "--sigma", noise_multiplier, "in [0.125, 16384]")
    found = setting.mechanism(noise_multiplier)
    by = {
        name: found.epsilon(setting.delta, accountant=name) for name in ("pld", "rdp")
    }
    return (
        f"sigma {round_up(noise_multiplier, 6)} spends epsilon {round_up(by['pld'], 5)}"
        f" by PLD ({by['rdp']:.4f} by RDP) at delta {setting.delta:g}, q ="
        f" {found.sampling_prob:.4g}, T = {setting.num_updates:,}"
    )


def needed(setting: Setting, epsilon: float) -> str:
    """Says which noise a budget takes, by the accountant of the runs (PLD).

    Raises:
      UserError: if none does.
    """
    found = calibrate(
        epsilon=epsilon,
        delta=setting.delta,
        sampling_prob=setting.batch_size / setting.num_records,
        num_updates=setting.num_updates,
        neighboring_relation=setting.relation,
    )
    return spent(setting, found.noise_multiplier)


def trade_offs(setting: Setting, epsilon: float) -> list[tuple[Setting, float]]:
    """Returns sigma by RDP for a quarter to four times the batch and the updates.

    Args:
      setting: around which to look.
      epsilon: the budget.

    Returns:
      Pairs of a setting and its sigma, of those whose sigma is in [0.1, 10000]; none
      for `REPLACE_ONE`, which RDP does not bound.
    """
    found = []
    for of_batch in _OF_BATCH:
        for of_updates in _OF_UPDATES:
            other = dataclasses.replace(
                setting,
                batch_size=min(setting.batch_size * of_batch, setting.num_records),
                num_updates=max(round(setting.num_updates * of_updates), 1),
            )
            sigma = noise_by_rdp(other.mechanism(1.0), epsilon, setting.delta)
            if sigma < math.inf and (other, sigma) not in found:
                found.append((other, sigma))
    return found


def table(found: Sequence[tuple[Setting, float]]) -> str:
    """Returns a line for each setting: B, T, sigma by RDP, and sigma / B."""
    lines = [f"{'batch':>10} {'updates':>9} {'sigma (RDP)':>12} {'sigma / B':>12}"]
    for setting, sigma in found:
        lines.append(
            f"{setting.batch_size:>10,.0f} {setting.num_updates:>9,} {sigma:>12.4f}"
            f" {sigma / setting.batch_size:>12.3e}"
        )
    return "\n".join(lines)


def draw(found: Sequence[tuple[Setting, float]], path: pathlib.Path) -> None:
    """Draws sigma, and sigma / B, against the updates, a line for each batch size.

    Raises:
      UserError: if the file cannot be written.
    """
    figure = matplotlib.figure.Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for batch in dict.fromkeys(setting.batch_size for setting, _ in found):
        of_batch = [(s.num_updates, n) for s, n in found if s.batch_size == batch]
        updates, sigmas = zip(*of_batch, strict=True)
        left.plot(updates, sigmas, marker="o", label=f"B = {batch:,.0f}")
        right.plot(updates, [sigma / batch for sigma in sigmas], marker="o")
    for axes, label in ((left, "sigma (RDP)"), (right, "sigma / B")):
        axes.set(xscale="log", yscale="log", xlabel="updates", ylabel=label)
        axes.grid(alpha=0.3)
    left.legend()
    try:
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        raise UserError(f"--plot is {path}: {error.strerror}") from None
