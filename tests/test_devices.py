"""Sums over several devices: `test_neighbours.py`."""

import threading

import pytest

from dpmix_jax import devices


def test_items_are_made_ahead_in_order_and_not_too_many():
    made = []
    results = devices.ahead(lambda item: made.append(item) or 2 * item, range(9))
    assert next(results) == 0
    assert list(results) == [2 * item for item in range(1, 9)]
    assert made == list(range(9))
    assert list(devices.ahead(lambda item: item, [])) == []


def test_nobody_waits_for_what_is_not_wanted_any_more():
    asked, made = iter(range(9)), []
    begun, gate = threading.Event(), threading.Event()

    def make(item):
        made.append(item)
        if item:
            begun.set()
            assert gate.wait(timeout=60)

    results = devices.ahead(make, asked, depth=3)
    next(results)
    assert next(asked) == 4  # three are under way
    assert begun.wait(timeout=60)
    threading.Timer(0.1, gate.set).start()
    results.close()
    assert made == [0, 1]


def test_an_error_in_the_other_thread_is_raised_in_its_turn():
    def fail(item):
        assert threading.current_thread() is not threading.main_thread()
        if item == 2:
            raise OSError("gone")
        return item

    results = devices.ahead(fail, range(9))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(results)
