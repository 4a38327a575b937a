"""Laws of retries: how often, how long, how far apart, and what is not retried. The clock advances only in waits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coldstill.common.retry import FIRST_WAIT_S, LONGEST_WAIT_S, retrying


class Busy(Exception):
    """A server that is busy; `retry_after_s` is its Retry-After header."""

    def __init__(self, retry_after_s: float = 0.0):
        super().__init__("busy")
        self.retry_after_s = retry_after_s


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock in the place of the system's."""
    clock = Clock()
    monkeypatch.setattr("time.sleep", clock.sleep)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    return clock


class Calls:
    """A function that raises each of `errors` in turn, then returns its argument."""

    def __init__(self, *errors: BaseException):
        self.errors, self.count = list(errors), 0

    def __call__(self, value: int, *, plus: int = 0) -> int:
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return value + plus


def is_busy(error: BaseException) -> bool:
    return isinstance(error, Busy)


def test_a_call_that_succeeds_is_made_once_and_without_a_wait(clock: Clock) -> None:
    calls = Calls()
    assert retrying(is_busy, attempts=5)(calls, 3, plus=4) == 7
    assert (calls.count, clock.waits) == (1, [])


def test_a_call_is_retried_until_it_succeeds(clock: Clock) -> None:
    calls = Calls(Busy(), Busy())
    assert retrying(is_busy, attempts=5)(calls, 3) == 3
    assert (calls.count, len(clock.waits)) == (3, 2)


def test_attempts_count_all_calls_and_the_last_error_is_raised_as_it_is(clock: Clock) -> None:
    errors = [Busy() for _ in range(9)]
    calls = Calls(*errors)
    with pytest.raises(Busy) as caught:
        retrying(is_busy, attempts=4)(calls, 3)
    assert caught.value is errors[3]
    assert (calls.count, len(clock.waits)) == (4, 3)


@pytest.mark.parametrize("seconds", [0.0, 0.2, 10.0, 500.0])
def test_no_wait_passes_the_given_seconds(clock: Clock, seconds: float) -> None:
    calls = Calls(*(Busy() for _ in range(1000)))
    with pytest.raises(Busy):
        retrying(is_busy, seconds=seconds)(calls, 3)
    assert sum(clock.waits) <= seconds
    assert sum(clock.waits) >= seconds - LONGEST_WAIT_S, "it gives up only where the next wait would pass them"
    assert (calls.count == 1) == (seconds < FIRST_WAIT_S / 2)


def test_waits_double_from_the_first_to_the_longest_and_are_cut_at_random(clock: Clock) -> None:
    with pytest.raises(Busy):
        retrying(is_busy, attempts=40)(Calls(*(Busy() for _ in range(40))), 3)
    for number, wait in enumerate(clock.waits):
        full = min(FIRST_WAIT_S * 2**number, LONGEST_WAIT_S)
        assert full / 2 <= wait <= full
    longest = clock.waits[10:]
    assert len(set(longest)) == len(longest), "a thousand workers must not come back in one instant"


def test_a_server_that_names_a_wait_gets_at_least_that(clock: Clock) -> None:
    assert retrying(is_busy, attempts=3)(Calls(Busy(retry_after_s=7.5), Busy(retry_after_s=0.01)), 3) == 3
    assert clock.waits[0] == 7.5
    assert clock.waits[1] >= FIRST_WAIT_S
    calls = Calls(Busy(retry_after_s=60.0))
    with pytest.raises(Busy):
        retrying(is_busy, seconds=30)(calls, 3)
    assert calls.count == 1, "a wait that would pass the seconds is not begun"


@pytest.mark.parametrize("make", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_is_not_to_be_retried_propagates_at_once(clock: Clock, make: Callable[[], BaseException]) -> None:
    error = make()
    calls = Calls(Busy(), error)
    with pytest.raises(type(error)) as caught:
        retrying(is_busy, seconds=600)(calls, 3)
    assert caught.value is error
    assert (calls.count, len(clock.waits)) == (2, 1)
