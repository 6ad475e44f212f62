"""What all runs on the same private records have spent together.

Epsilon is of one run. Whoever releases several models of the same records has promised
less than any of them says. The ledger has a file for each set of private records, named
by their checksums, with a line for each run that began on them and, if one was
declared, for the budget of all together. Each line holds the checksum of those before
it, so that one that was changed, or taken out from between others, is noticed.

A private selection has one line for all its candidates. It spends on a record that
candidates train on, or on one that they are compared by; the ledger counts whichever is
more.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import dp_accounting
import numpy as np
from dp_accounting import pld, rdp

from dpmix_jax import accounting, data
from dpmix_jax.accounting import RELATIONS, Mechanism
from dpmix_jax.data.public import image_checksums
from dpmix_jax.errors import UserError, require
from dpmix_jax.files import locked, naming
from dpmix_jax.progress import say
from dpmix_jax.run.statement import round_up
from dpmix_jax.selection import Selection


class Spent(NamedTuple):
    """A run of the ledger.

    Attributes:
      mechanism: of the run.
      delta: of its claim.
      epsilon: of its claim.
      workdir: where it began.
      time: when, in UTC.
    """

    mechanism: Mechanism
    delta: float
    epsilon: float
    workdir: str
    time: str


def folder() -> pathlib.Path:
    """Returns `DPMIX_JAX_LEDGER`, by default `~/.local/state/dpmix_jax/ledger`."""
    named = os.environ.get("DPMIX_JAX_LEDGER")
    default = pathlib.Path.home() / ".local" / "state" / "dpmix_jax" / "ledger"
    return pathlib.Path(named) if named else default


def of(dataset: data.Dataset) -> "Ledger":
    """Returns the ledger of training and validation images together.

    It is the same for other labels, and for other splits into these two. Records in
    another size, or a half of them, have a ledger of their own.
    """
    parts = [part for part in (dataset.train, dataset.validation) if part is not None]
    checksums = sorted(each for part in parts for each in image_checksums(part.images))
    name = hashlib.sha256(b"".join(checksums)).hexdigest()
    return Ledger(folder() / f"{name}.jsonl")


class Ledger:
    """The file of one set of private records.

    Formal guarantees:
      - A run is written down before it looks at a record, and no line is ever changed.
      - `spend` refuses a run with which the budget would be exceeded.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """Returns the lines, without their checksums.

        Raises:
          UserError: if a line was changed or taken out.
        """
        found, before = [], ""
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        for number, line in enumerate(text.splitlines(), 1):
            try:
                content = json.loads(line)
                checksum = content.pop("sha256")
            except (ValueError, KeyError, AttributeError, TypeError):
                checksum = None
            if checksum is None or checksum != _checksum(before, content):
                raise UserError(f"{self.path} is damaged at line {number}")
            found.append(content)
            before = checksum
        return found

    def runs(self) -> list[Spent]:
        """Returns the runs that began, in order."""
        return [
            Spent(
                _mechanism(line["mechanism"]),
                *(line[name] for name in ("delta", "epsilon", "workdir", "time")),
            )
            for line in self.lines()
            if "mechanism" in line
        ]

    def budget(self) -> tuple[float, float] | None:
        """Returns the (epsilon, delta) that was last declared, or None."""
        declared = [line["budget"] for line in self.lines() if "budget" in line]
        return (declared[-1]["epsilon"], declared[-1]["delta"]) if declared else None

    def declare(self, epsilon: float, delta: float) -> None:
        """Declares what all runs together may spend, those before among them.

        Raises:
          UserError: if epsilon is not positive and finite, or delta not in (0, 1).
        """
        allowed = "positive and finite"
        require(0 < epsilon < math.inf, "--declare", epsilon, allowed)
        require(0 < delta < 1, "--delta", delta, "in (0, 1)")
        with self._locked():
            self._add({"budget": {"epsilon": epsilon, "delta": delta}})

    def spend(
        self, mechanism: Mechanism, *, epsilon: float, delta: float, workdir: str
    ) -> None:
        """Writes a run down before it begins.

        Args:
          mechanism: of the run.
          epsilon: of its claim.
          delta: of its claim.
          workdir: where it begins.

        Raises:
          UserError: if all runs together would exceed the budget, or for a damaged
            file.
        """
        if not _is_writable(self.path.parent):
            try:
                declared = self.budget()
            except OSError as error:
                raise UserError(f"{self.path}: {error.strerror}") from None
            if declared:
                raise UserError(
                    f"{self.path.parent} is not writable, and epsilon {declared[0]:g}"
                    f" is declared in {self.path}: no run can be written down there"
                )
            say(
                f"warning: {self.path.parent} is not writable, so this run is in no"
                " ledger: DPMIX_JAX_LEDGER names another folder"
            )
            return
        with self._locked():
            budget, new = self.budget(), Spent(mechanism, delta, epsilon, workdir, "")
            if budget and (total := composed([*self.runs(), new], budget[1])) > (
                budget[0] * (1 + 1e-6)
            ):
                raise UserError(
                    f"privacy.epsilon is {epsilon:g}: with what runs spent before it on"
                    f" these records that makes {total:.4g} at delta {budget[1]:g}, and"
                    f" {budget[0]:g} is declared in {self.path}"
                )
            self._add(
                {
                    "mechanism": _as_dict(mechanism),
                    "delta": delta,
                    "epsilon": epsilon,
                    "workdir": workdir,
                }
            )

    def table(self, delta: float) -> str:
        """Returns the runs, what they spent together at a delta, and the budget."""
        runs, budget = self.runs(), self.budget()
        if budget:
            delta = budget[1]
        total = composed(runs, delta)
        return "\n".join(
            [
                f"{self.path}",
                *(
                    f"{run.time}  ({run.epsilon:g}, {run.delta:g})-DP  {run.workdir}"
                    for run in runs
                ),
                f"{len(runs)} runs: epsilon {round_up(total)} together, at delta"
                f" {delta:g}" + (f", of {budget[0]:g}" if budget else ""),
            ]
        )

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.path.parent, f"ledger {self.path.parent}", wait=True)

    def _add(self, content: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        content = {"time": now, **content}
        before = ""
        if self.lines():
            before = json.loads(self.path.read_text().splitlines()[-1])["sha256"]
        line = {**content, "sha256": _checksum(before, content)}
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o600)
        with naming(self.path), open(descriptor, "wb", buffering=0) as file:
            size, text = os.fstat(descriptor).st_size, f"{json.dumps(line)}\n".encode()
            try:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise


def _is_writable(path: pathlib.Path) -> bool:
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.access(path, os.W_OK)
    return False


def _checksum(before: str, content: dict[str, Any]) -> str:
    text = before + json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_dict(mechanism: Mechanism) -> dict[str, Any]:
    selection = mechanism.selection
    return {
        # What the accountant counts, whatever turns records take.
        "sampling_prob": mechanism.bands * mechanism.sampling_prob,
        "num_updates": mechanism.num_turns,
        **({"allocated": True} if mechanism.allocated else {}),
        "noise_multiplier": mechanism.noise_multiplier,
        "neighboring_relation": mechanism.neighboring_relation.name.lower(),
        "selection": selection
        and [selection.distribution, selection.expected_candidates],
    }


def _mechanism(content: dict[str, Any]) -> Mechanism:
    chosen = content["selection"]
    return Mechanism(
        sampling_prob=content["sampling_prob"],
        num_updates=content["num_updates"],
        noise_multiplier=content["noise_multiplier"],
        neighboring_relation=RELATIONS[content["neighboring_relation"]],
        selection=chosen
        and Selection(distribution=chosen[0], expected_candidates=chosen[1]),
        allocated=content.get("allocated", False),
    )


def composed(runs: Sequence[Spent], delta: float) -> float:
    """Returns the epsilon that these runs have spent together.

    By PLD, or by RDP if one of them is a private selection. Relations are not mixed,
    nor random allocation with others: where there are several, epsilons and deltas add
    up.
    """
    mechanisms = [run.mechanism for run in runs]
    relations = {each.neighboring_relation for each in mechanisms}
    allocated = any(each.allocated for each in mechanisms)
    if len(relations) > 1 or (allocated and len(runs) > 1):
        return sum(composed([run], delta / len(runs)) for run in runs)
    if any(each.selection for each in mechanisms):
        return _by_rdp(runs, delta)
    if len(runs) <= 1:
        return sum(each.epsilon(delta) for each in mechanisms)
    accountant = pld.PLDAccountant(neighboring_relation=relations.pop())
    for each in mechanisms:
        accountant.compose(each.event())
    return float(accountant.get_epsilon(delta))


def _by_rdp(runs: Sequence[Spent], delta: float) -> float:
    """Returns the epsilon of runs with private selections among them.

    A record pays for a selection as one that candidates train on or as one that they
    are compared by. In another selection it may be the other, so that of several the
    larger is counted at each order of RDP.
    """
    with accounting.quiet():
        accountants = [[_rdp(run, event) for event in _events(run)] for run in runs]
    if len(runs) == 1:
        return max(float(each.get_epsilon(delta)) for each in accountants[0])
    # dp_accounting has no public name for the curve.
    curves = (np.maximum.reduce([a._rdp for a in of_run]) for of_run in accountants)
    orders = accountants[0][0]._orders
    return float(rdp.compute_epsilon(orders, sum(curves), delta)[0])


def _events(run: Spent) -> list[dp_accounting.DpEvent]:
    """Returns what training records and, of a selection, validation records see."""
    events = [run.mechanism.event()]
    if (chosen := run.mechanism.selection) is not None:
        relation = run.mechanism.neighboring_relation
        score = chosen.score_noise(run.epsilon, run.delta, relation)
        events.append(chosen.event(dp_accounting.GaussianDpEvent(score)))
    return events


def _rdp(run: Spent, event: dp_accounting.DpEvent) -> rdp.RdpAccountant:
    relation = run.mechanism.neighboring_relation
    accountant = rdp.RdpAccountant(neighboring_relation=relation)
    accountant.compose(event)
    return accountant
