"""Prefetched items: the same items, the same errors, and no thread is left."""

from __future__ import annotations

import threading
import time
from itertools import count

import pytest

from coldstill.trainer.data.prefetch import DaemonExecutor, prefetch


def threads() -> int:
    return sum(thread.name == "prefetch-batches" for thread in threading.enumerate())


def test_the_items_are_the_same():
    assert list(prefetch((n for n in range(50)), depth=2)) == list(range(50))
    assert threads() == 0


def test_at_most_depth_items_and_one_more_are_prefetched():
    made = []

    def items():
        for n in count():
            made.append(n)
            yield n

    got = prefetch(items(), depth=3)
    assert next(got) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5
    got.close()


def test_an_error_is_raised_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise ValueError("the third")

    got = prefetch(items(), depth=9)
    assert [next(got), next(got)] == [1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(got)
    assert threads() == 0


def test_stopping_early_ends_the_thread_and_closes_the_items():
    ended = threading.Event()

    def items():
        try:
            yield from count()
        finally:
            ended.set()

    got = prefetch(items(), depth=1)
    assert next(got) == 0
    got.close()
    assert ended.is_set()
    assert threads() == 0


def test_calls_run_in_order_and_each_raises_its_own_error():
    done: list[int] = []
    calls = DaemonExecutor()
    results = [calls.submit(lambda n=n: done.append(n) or 1 / (n - 2)) for n in range(5)]
    assert [results[n].result() for n in (0, 1, 3, 4)] == [-0.5, -1, 1, 0.5]
    with pytest.raises(ZeroDivisionError):
        results[2].result()
    assert done == [0, 1, 2, 3, 4]
    calls.close()
