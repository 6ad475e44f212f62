"""What a run says while it goes on."""

import sys
import time
from typing import TextIO

import jax


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line at once, to the standard error stream unless told otherwise."""
    print(text, file=file or sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds, as 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class Progress:
    """Speed and remaining time, compilation of the first update left out."""

    def __init__(self, first: int, last: int, started: float):
        self.last, self._started = last, started
        self._first, self._done, self._records = first, first, 0.0
        self._start: float | None = None

    def add(self, records: jax.Array | int) -> None:
        """Counts an update and the records it drew."""
        count = float(records)  # waits for the update
        if self._start is None:
            self._start, self._first = time.monotonic(), self._first + 1
            say(f"first update after {self._start - self._started:.1f} s")
        else:
            self._records += count
        self._done += 1

    def records_per_second(self) -> float:
        assert self._start is not None
        return self._records / max(time.monotonic() - self._start, 1e-9)

    def eta(self) -> str:
        assert self._start is not None
        if self._done == self._first:
            return "-:--:--"
        pace = (time.monotonic() - self._start) / (self._done - self._first)
        return duration(pace * (self.last - self._done))
