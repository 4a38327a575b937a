"""The package stays a short walk: few files on the way, none of them long. `docs/design.md` gives the counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reading_path import capture_path, files_that_run, loss_path, product_files

MAX_FILES, MAX_LINES = 288, 400


def test_a_capture_of_one_unit_runs_through_at_most_thirty_two_files(tmp_path: Path) -> None:
    """Two of them are settings: those of the source have a file of their own, because one file would be too long. One
    draws the progress bars of all commands, live or as lines of a log. Two bound templates: their steps and memory."""
    files = capture_path(tmp_path)
    assert {"pipeline/config.py", "pipeline/worker.py", "pipeline/sources/chat_template.py"} <= set(files)
    assert len(files) <= 32, files


def test_a_batch_reaches_its_loss_and_gradient_through_at_most_seven_files(tmp_path: Path) -> None:
    files = loss_path(tmp_path)
    assert {"trainer/distill_trainer.py", "trainer/losses/taid.py"} <= set(files)
    assert len(files) <= 7, files


def test_few_files_are_installed_and_none_is_long() -> None:
    lines = {str(file): len(file.read_text().splitlines()) for file in product_files()}
    assert len(lines) <= MAX_FILES
    assert {file: count for file, count in lines.items() if count > MAX_LINES} == {}


def test_a_file_counts_where_a_function_of_it_runs_and_not_where_it_is_imported() -> None:
    import coldstill.common.errors as errors

    with files_that_run() as ran:
        pass
    assert ran == []
    with files_that_run() as ran, pytest.raises(errors.ColdstillError):
        raise errors.ColdstillError("what")
    assert ran == ["common/errors.py"]
