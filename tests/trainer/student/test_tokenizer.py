"""Laws of the student's tokenizer: equal ids decide, other steps between text and tokens are told, no text is lost."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from coldstill.storage_schema.errors import TokenizerMismatch
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, fingerprint
from coldstill.trainer.errors import StudentNotFound
from coldstill.trainer.student.tokenizer import check_tokenizer, load_tokenizer, warn_if_unfaithful
from tests import making

TEXT = "Hello world, so it is. 你好"


def _header(folder: Path, pipeline: str | None) -> DatasetHeader:
    header = making.tiny_header(folder)
    about = header.about.model_copy(update={"tokenizer_pipeline_sha256": pipeline})
    return header.model_copy(update={"about": about})


def test_a_tokenizer_that_splits_text_in_another_way_is_told_and_accepted(
    tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = (tokenizer_folder / TOKENIZER_FILE).read_bytes()
    same = _header(tokenizer_folder, fingerprint(tokenizer_folder).pipeline_sha256)
    with caplog.at_level(logging.WARNING):
        check_tokenizer(data, same, name="s")
        check_tokenizer(data, _header(tokenizer_folder, None), name="s")  # an older dataset does not state it
        assert caplog.text == ""
        check_tokenizer(data, _header(tokenizer_folder, "0" * 64), name="s")
    assert "splits text in another way" in caplog.text
    assert "can be used" in caplog.text


def test_other_ids_are_refused_whatever_the_steps(tokenizer_folder: Path) -> None:
    header = making.tiny_header(tokenizer_folder).model_copy(update={"tokenizer_fingerprint": "0" * 64})
    with pytest.raises(TokenizerMismatch):
        check_tokenizer((tokenizer_folder / TOKENIZER_FILE).read_bytes(), header, name="s")


def test_a_students_tokenizer_is_loaded_as_its_file_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(str(making.misnamed_tokenizer(tmp_path)))
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert "The file decides" in caplog.text
    warn_if_unfaithful(tmp_path)
    assert "load it with PreTrainedTokenizerFast" in caplog.text
    with pytest.raises(StudentNotFound):
        load_tokenizer(str(tmp_path / "nothing"))


def test_a_finished_student_whose_tokenizer_no_class_loads_rightly_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights are right; a warning does not cost the run."""
    making.chat_model(tmp_path)
    warn_if_unfaithful(tmp_path)
    assert caplog.text == ""
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps({"model": {}}))
    warn_if_unfaithful(tmp_path)
    assert "tokenizer" in caplog.text
