"""Private selection: one of many runs is released, and the choice is accounted for.

Whoever trains with several hyperparameters and keeps the best run has looked at the
records more often than the epsilon of that run says. It costs less than the sum of all
runs if their number is random and secret, each run draws its hyperparameters for
itself, and nothing but the best comes out (Papernot and Steinke, 2022, "Hyperparameter
Tuning with Renyi Differential Privacy", Theorems 2 and 6).

What runs are compared by must be private too. It is the number of validation records
that a model classifies correctly, plus Gaussian noise: an output of the run like its
weights. Two neighbouring datasets differ in one record. If it is a training record,
only the weights differ, and all that follows is post-processing. If it is a validation
record, only the noisy number differs. So the choice is as private as the weaker of
training and counting, each repeated and selected; the two epsilons do not add up.
(Which records are for validation is taken as given: neighbours are pairs of a training
and a validation set that differ in one record.)

The theorems need the number of candidates that was drawn. Starting over because that
number was small or large is another selection, which is not accounted for.
"""

import dataclasses
import math

import dp_accounting
import numpy as np
import scipy.optimize
from dp_accounting import NeighboringRelation, dp_event, rdp

from dpmix_jax.errors import UserError, require

# Shape of the truncated negative binomial distribution, whose limit is Poisson's.
SHAPES = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """How many candidate runs there are, of which one is released.

    Formal guarantees:
      - The number of candidates that `draw` returns has the distribution that `event`
        accounts for; each takes a point uniformly and independently of the others.
      - With `score_noise`, `score_epsilon` is at most the epsilon asked for.

    Attributes:
      distribution: of the number of candidates: `logarithmic`, which needs the least
        noise but often draws few; `geometric`; or `poisson`, which needs the most
        noise, stays nearest to its mean, and may draw none.
      expected_candidates: mean of `distribution`, more than 1 and at most 1,000,000.
    """

    distribution: str
    expected_candidates: float

    def __post_init__(self):
        shape, mean = self.distribution, self.expected_candidates
        known = f"None or one of {', '.join(SHAPES)}"
        require(shape in SHAPES, "privacy.selection", shape, known)
        allowed = "more than 1 and at most 1,000,000"
        require(1 < mean <= 1e6, "privacy.expected_candidates", mean, allowed)

    def event(self, candidate: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
        """Returns the event of all candidates, of which only the best is released.

        Args:
          candidate: the event of one, whatever its hyperparameters.
        """
        return dp_event.RepeatAndSelectDpEvent(
            candidate, self.expected_candidates, SHAPES[self.distribution]
        )

    def draw(self, num_points: int, rng: np.random.Generator) -> list[int]:
        """Draws the candidates: for each, which of the points of a grid it takes.

        Args:
          num_points: of the grid.
          rng: secret: the number of candidates is none of what is released.
        """
        mean = self.expected_candidates
        number = {
            "poisson": lambda: rng.poisson(mean),
            "geometric": lambda: rng.geometric(1 / mean),
            "logarithmic": lambda: rng.logseries(_log_series_parameter(mean)),
        }[self.distribution]()
        return rng.integers(num_points, size=number).tolist()

    def score_epsilon(
        self, noise: float, delta: float, relation: NeighboringRelation
    ) -> float:
        """Returns the epsilon, for validation records, of choosing by noisy counts.

        Args:
          noise: standard deviation on the number of correctly classified records,
            which one record changes by at most 1.
          delta: in (0, 1).
          relation: not `REPLACE_ONE`, for which RDP has no bound on training.
        """
        ledger = rdp.RdpAccountant(neighboring_relation=relation)
        ledger.compose(self.event(dp_accounting.GaussianDpEvent(noise)))
        return float(ledger.get_epsilon(delta))

    def score_noise(
        self, epsilon: float, delta: float, relation: NeighboringRelation
    ) -> float:
        """Returns the least noise with which choosing stays within (epsilon, delta).

        Raises:
          UserError: if no noise does.
        """
        least = 0.05
        if self.score_epsilon(least, delta, relation) <= epsilon:
            return least
        try:
            return dp_accounting.calibrate_dp_mechanism(
                make_fresh_accountant=lambda: rdp.RdpAccountant(
                    neighboring_relation=relation
                ),
                make_event_from_param=lambda noise: self.event(
                    dp_accounting.GaussianDpEvent(noise)
                ),
                target_epsilon=epsilon,
                target_delta=delta,
                bracket_interval=dp_accounting.ExplicitBracketInterval(least, 1e6),
                tol=1e-4,
            )
        except ValueError:
            raise UserError(
                f"privacy.expected_candidates is {self.expected_candidates:g}: no noise"
                f" makes a choice among so many ({epsilon:g}, {delta:g})-DP"
            ) from None


def _log_series_parameter(mean: float) -> float:
    """Returns p of the logarithmic distribution -p^k / (k log(1 - p)) of this mean."""

    def excess(log_odds: float) -> float:  # p / (1 - p) = exp(log_odds)
        odds = math.exp(log_odds)
        return odds / math.log1p(odds) - mean

    odds = math.exp(scipy.optimize.brentq(excess, -40.0, 80.0, xtol=1e-12))
    return odds / (1 + odds)
