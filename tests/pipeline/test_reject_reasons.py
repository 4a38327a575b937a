"""Laws of reject reasons: one list, whose values never change, and no reject with another reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.storage_schema.commits import read_commit
from tests.pipeline.capturing import capture_config, do_units

PIPELINE = Path(__file__).parents[2] / "pipeline"
PLACE = {"Reject": 2, "RowUnusable": 0, "reject": 0}
"""Where a call has its reason."""
FIRST_RELEASE = {
    "not_json", "no_messages", "no_text", "bad_messages", "bad_tools", "no_prompt", "no_response", "template_failed",
    "template_cannot_mark", "cannot_mark", "metadata_too_large", "over_long", "no_room", "no_targets",
    "kills_the_engine", "non_finite_logits",
}  # fmt: skip


def _reasons() -> Iterator[tuple[str, str]]:
    """(file, source text of the reason) of each reject that the product makes."""
    for path in sorted(PIPELINE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in PLACE:
                    yield path.name, ast.unparse(node.args[PLACE[name]])


def test_every_reject_has_a_reason_from_the_list() -> None:
    """Directly, or by a name that is typed as `RejectReason`, which mypy holds."""
    passed_on = {"reason", "why.reason", "bad"}
    found = list(_reasons())
    assert len(found) > 15
    for file, reason in found:
        assert reason.startswith("RejectReason.") or reason in passed_on, (file, reason)


def test_every_reason_is_used() -> None:
    texts = "".join(path.read_text() for path in PIPELINE.rglob("*.py") if path.name != "reject_reasons.py")
    assert [reason.name for reason in RejectReason if f"RejectReason.{reason.name}" not in texts] == []


def test_every_reason_is_a_string_with_a_sentence() -> None:
    for reason in RejectReason:
        assert str(reason) == f"{reason}" == reason.value == reason.name.lower()
        assert reason.sentence.endswith(".")
        assert len(reason.sentence) > 20


def test_reasons_of_earlier_datasets_keep_their_values() -> None:
    assert {reason.value for reason in RejectReason} >= FIRST_RELEASE


def test_an_answer_that_readers_would_not_take_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldstill.pipeline.worker.MAX_ENTRIES", 12 * 4)
    config = capture_config(tmp_path, mode="generate", sampling={"max_tokens": 5})
    store = prepare(config).store
    do_units(config)
    commit = read_commit(store, 0)
    assert commit.rows + commit.rejected == 10
    assert commit.environment["reject_reasons"] == {"too_many_targets": commit.rejected}
