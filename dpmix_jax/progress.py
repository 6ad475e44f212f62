"""What a run says while it goes on."""

import contextlib
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

import jax
from tqdm import tqdm

_SECONDS = 10.0  # until a bar of images is shown, and between two times
_silent = False


def silence(silent: bool) -> None:
    """Lets this process say nothing, as all but the first of several do."""
    global _silent
    _silent = silent


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line at once, to the standard error stream unless told otherwise.

    On a terminal, a bar that is there moves below it.
    """
    if _silent:
        return
    stream = file or sys.stderr
    tqdm.write(text, file=stream)
    stream.flush()


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds, as 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def bar(of: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Returns a bar of images, which is shown if they take long; see `tqdm.tqdm`."""
    usual = {"unit": " images", "delay": _SECONDS, "mininterval": _SECONDS}
    return tqdm(of, disable=_silent, **usual | options)


class Progress(contextlib.AbstractContextManager):
    """Speed and remaining time, compilation of the first update left out.

    On a terminal a bar shows how far it is; elsewhere there is none.
    """

    def __init__(self, first: int, last: int, started: float):
        self.last, self._started = last, started
        self._first, self._done, self._records = first, first, 0.0
        self._start: float | None = None
        self._bar = tqdm(
            initial=first,
            total=last,
            disable=_silent or None,  # None: unless it is a terminal
            leave=False,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {bar:30} {n_fmt}/{total_fmt}{postfix}",
        )

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def add(self, records: jax.Array | int) -> None:
        """Counts an update and the records it drew."""
        count = float(records)  # waits for the update
        if self._start is None:
            self._start, self._first = time.monotonic(), self._first + 1
            say(f"first update after {self._start - self._started:.1f} s")
        else:
            self._records += count
        self._done += 1
        self._bar.update()

    def show(self, text: str) -> None:
        """Shows a text beside the bar, and the time that is left."""
        self._bar.set_postfix_str(f"{text}  ETA {self.eta()}")

    def records_per_second(self) -> float:
        assert self._start is not None
        return self._records / max(time.monotonic() - self._start, 1e-9)

    def eta(self) -> str:
        assert self._start is not None
        if self._done == self._first:
            return "-:--:--"
        pace = (time.monotonic() - self._start) / (self._done - self._first)
        return duration(pace * (self.last - self._done))
