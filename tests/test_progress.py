"""What a run says while it goes on: lines, and on a terminal a bar below them."""

import io
import sys
import time

import pytest

from dpmix_jax.progress import Progress, bar, duration, say, silence


class Terminal(io.StringIO):
    def isatty(self):
        return True


def written(monkeypatch, stream):
    """Returns what a run of four updates, two of them done before, writes."""
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(2, 4, time.monotonic()) as progress:
        for number in (3, 4):
            progress.add(10)
            say(f"update {number}/4")
            progress.show(f"epsilon {number}.00 of 4")
    say("the end")
    return stream.getvalue()


def test_without_a_terminal_there_are_lines_alone(monkeypatch):
    first, *lines = written(monkeypatch, io.StringIO()).splitlines()
    assert first.startswith("first update after 0.")
    assert lines == ["update 3/4", "update 4/4", "the end"]


def test_other_processes_say_nothing(monkeypatch):
    stream = Terminal()
    silence(True)
    try:
        monkeypatch.setattr("dpmix_jax.progress._SECONDS", 0.0)
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(bar(range(3))) == [0, 1, 2]
        assert written(monkeypatch, stream) == ""
    finally:
        silence(False)


def test_on_a_terminal_a_bar_stays_below_the_lines(monkeypatch):
    text = written(monkeypatch, Terminal())
    screen = [line.split("\r")[-1].strip() for line in text.split("\n")]
    assert [line for line in screen if line.startswith(("update", "the end"))] == [
        *("update 3/4", "update 4/4", "the end")
    ]
    assert " 75% " in text
    assert "3/4, epsilon 3.00 of 4  ETA -:--:--" in text
    assert "4/4, epsilon 4.00 of 4  ETA 0:00:00" in text
    assert screen[-1] == ""  # the bar is gone


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
