"""Background threads that prepare data ahead of the training loop and end with the process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_END = object()
_POLL_S = 0.1
"""Seconds between two checks of a blocked producer for whether its consumer has stopped."""


class DaemonExecutor:
    """Runs functions in up to `threads` daemon threads, and begins them in the order of their submission.

    The threads of `concurrent.futures` would delay the exit of the process until all submitted calls are done.
    """

    def __init__(self, threads: int = 1) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._missing_threads = threads

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Run `call` after those submitted before it have begun; the future holds its result or exception."""
        if self._missing_threads:
            self._missing_threads -= 1
            threading.Thread(target=self._run, name="prefetch-shards", daemon=True).start()
        future: Future[Result] = Future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """Accept no more calls; the threads end after those already submitted."""
        self._calls.put(None)

    def _run(self) -> None:
        while (task := self._calls.get()) is not None:
            future, call = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
        self._calls.put(None)  # for the next thread


def prefetch(items: Generator[Item, None, None], *, depth: int) -> Iterator[Item]:
    """Yield the same items, with up to `depth` of them computed in advance by a thread.

    An exception of `items` is raised here after the items before it. Closing this generator closes `items` too, in its
    thread.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            with closing(items):
                for item in items:
                    if not put((item, None)):
                        return
            put((_END, None))
        except BaseException as error:
            put((_END, error))

    thread = threading.Thread(target=produce, name="prefetch-batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
