"""Runs a command in this process; a capture's smallest settings."""

from __future__ import annotations

import sys

import pytest

from coldstill.cli.main import main

CAPTURE = {"output": "o", "source": {"path": "x.jsonl"}, "teacher": {"model": "m"}}


def run_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["coldstill", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)
