"""Laws of progress bars: live on a terminal, a few whole lines in a log."""

from __future__ import annotations

import io
import sys

import pytest

from coldstill.common import progress
from coldstill.common.progress import LogLines, tqdm


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_whole_line_each_thirty_seconds_and_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress, "log_lines", lambda: LogLines(log, clock=lambda: now[0]))
    with tqdm(total=110, desc="capture", unit=" rows", mininterval=0) as bar:
        for second in range(1, 111):
            now[0] = second
            bar.set_postfix_str(f"second {second}", refresh=False)
            bar.update()
    lines = log.getvalue().splitlines()
    assert [line.rpartition(", ")[2].rstrip("]") for line in lines] == [f"second {s}" for s in (30, 60, 90, 110)]
    assert all(line.startswith("capture: ") and "\r" not in line for line in lines)


def test_two_bars_at_once_and_a_message_between_them_keep_whole_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tqdm(total=2, desc="outer") as outer, tqdm(total=2, desc="inner") as inner:
        outer.update(2)
        inner.update(2)
        tqdm.write("a message", file=sys.stderr)
    out = capsys.readouterr().err
    assert out.splitlines()[0] == "a message"
    assert [line.split(":")[0] for line in out.splitlines()[1:]] == ["inner", "outer"]
    assert not set("\r\x1b") & set(out)


def test_a_short_task_whose_bar_waits_writes_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in tqdm(range(3), delay=3):
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in tqdm(range(3), mininterval=0):
        pass
    assert terminal.getvalue().count("\r") > 3
