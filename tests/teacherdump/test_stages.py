"""The two threads round the loop: order, bounds, errors, and an end whatever happens."""

import threading
import time
from collections.abc import Iterator

import pytest

from teacherdump.stages import ReadAhead, WriteBehind


def never() -> bool:
    return False


def test_items_come_in_order_and_the_thread_ends() -> None:
    with ReadAhead(iter(range(100)), 3) as ahead:
        assert list(ahead.until(never)) == list(range(100))
    assert not ahead._thread.is_alive()


def test_no_more_than_the_depth_is_made_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for item in range(50):
            made.append(item)
            yield item

    with ReadAhead(items(), 3) as ahead:
        taken = ahead.until(never)
        next(taken)
        time.sleep(0.3)
        assert len(made) <= 1 + 3 + 1  # taken, waiting, and in the maker's hand


def test_what_the_maker_raises_comes_behind_what_it_made() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    found: list[int] = []
    with ReadAhead(items(), 3) as ahead, pytest.raises(OSError, match="gone"):
        found.extend(ahead.until(never))
    with ReadAhead(items(), 3) as ahead:
        taken = ahead.until(never)
        assert next(taken) == 1
        with pytest.raises(OSError, match="gone"):
            next(taken)


def test_leaving_early_ends_a_maker_that_waits() -> None:
    with ReadAhead(iter(range(10**6)), 2) as ahead:
        next(ahead.until(never))
    assert not ahead._thread.is_alive()


def test_a_stop_ends_the_items_though_none_comes() -> None:
    stop, gate = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        gate.wait(10)
        yield 1

    threading.Timer(0.2, stop.set).start()
    with ReadAhead(items(), 2) as ahead:
        assert list(ahead.until(stop.is_set)) == []
        gate.set()


def test_everything_that_was_put_is_written_in_order() -> None:
    written: list[int] = []
    with WriteBehind(written.append, 2) as behind:
        for item in range(50):
            behind.put(item)
    assert written == list(range(50))


def test_a_put_waits_while_the_depth_is_full() -> None:
    gate = threading.Event()
    with WriteBehind[int](lambda _: gate.wait(5), 1) as behind:
        behind.put(1)
        time.sleep(0.1)
        behind.put(2)
        threading.Timer(0.3, gate.set).start()
        start = time.perf_counter()
        behind.put(3)
        assert time.perf_counter() - start > 0.1


def fail(item: int) -> None:
    if item == 1:
        raise OSError("disk")


def test_what_a_write_raises_is_raised_on_leaving_and_later_items_are_dropped() -> None:
    behind = WriteBehind(fail, 5)

    def put_all() -> None:
        with behind:
            for item in range(4):
                behind.put(item)

    with pytest.raises(OSError, match="disk"):
        put_all()
    assert behind.failed


def test_what_a_write_raises_is_raised_from_the_next_put() -> None:
    def put_many() -> None:
        with WriteBehind(fail, 1) as behind:
            behind.put(1)
            for _ in range(100):
                time.sleep(0.02)
                behind.put(0)
            pytest.fail("it was never raised")

    with pytest.raises(OSError, match="disk"):
        put_many()


def test_another_error_is_not_hidden_by_that_of_a_write() -> None:
    def put_and_fail() -> None:
        with WriteBehind(fail, 1) as behind:
            behind.put(1)
            raise KeyError

    with pytest.raises(KeyError):
        put_and_fail()
