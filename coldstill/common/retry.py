"""Retries with exponential backoff: one policy for stores and servers, built on tenacity."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_before_delay
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from .interrupts import received

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
_SLICE_S = 0.5
"""After this time, a waiting thread notices Ctrl-C."""


class BackoffWait(wait_base):
    """Waits that double from `FIRST_WAIT_S` to `LONGEST_WAIT_S`, each cut by a random factor between 0.5 and 1.

    The random factor keeps a thousand workers from retrying in the same instant. An exception with a
    `retry_after_s` attribute (the server's Retry-After header) lengthens the wait to at least that many seconds.
    """

    def __call__(self, retry_state: RetryCallState) -> float:
        doubled = FIRST_WAIT_S * 2.0 ** min(retry_state.attempt_number - 1, 16)
        wait = min(doubled, LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
        error = retry_state.outcome.exception() if retry_state.outcome else None
        return max(wait, getattr(error, "retry_after_s", 0.0))


def retrying(
    retry_if: Callable[[BaseException], bool],
    *,
    attempts: int | None = None,
    seconds: float | None = None,
    on_wait: Callable[[float, BaseException], None] = lambda wait_s, error: None,
) -> Retrying:
    """Calls a function until it succeeds: `retrying(...)(function, *arguments)`.

    An exception for which `retry_if` is false propagates at once. After any other the call is repeated, up to
    `attempts` calls in all, or while the next wait ends within `seconds` of the first call. Then the last exception is
    raised unchanged. `on_wait` is called before each wait with its seconds and the exception. After Ctrl-C, the wait of
    another thread ends with one more call: the main thread waits for its threads.
    """
    before = len(received)

    def is_interrupted() -> bool:
        return len(received) > before

    def sleep(seconds: float) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        while seconds > 0 and not is_interrupted():
            wait = seconds if is_main else min(seconds, _SLICE_S)
            time.sleep(wait)
            seconds -= wait

    def before_sleep(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if error is not None and state.next_action is not None:
            on_wait(state.next_action.sleep, error)

    stop: stop_base = stop_after_attempt(attempts) if attempts is not None else stop_before_delay(seconds or 0.0)
    return Retrying(
        retry=retry_if_exception(retry_if),
        stop=lambda state: is_interrupted() or stop(state),
        wait=BackoffWait(),
        sleep=sleep,
        reraise=True,
        before_sleep=before_sleep,
    )
