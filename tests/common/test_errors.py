"""Laws of named errors: what they print, and that pickling between processes keeps them whole."""

from __future__ import annotations

import pickle

import pytest

from coldstill.common.errors import ColdstillError, first_line
from coldstill.storage_schema.errors import FileDamaged, FileMissing, ShardDamaged, ShardMissing, StreamDamaged


def test_an_error_prints_what_failed_and_only_the_facts_that_it_has() -> None:
    assert str(ColdstillError("field")) == "field"
    whole = ColdstillError("field", found=0, wanted="1 or more", fix="raise it")
    assert str(whole) == "field\n  found:  0\n  wanted: 1 or more\n  do:     raise it"


def test_a_place_goes_before_the_message_and_nothing_else_changes() -> None:
    placed = ShardDamaged("rows", found=3, wanted=4, fix="copy it").at("shard 7")
    assert type(placed) is ShardDamaged
    assert (placed.what, placed.found, placed.wanted, placed.fix) == ("shard 7: rows", 3, 4, "copy it")


@pytest.mark.parametrize("kind", [FileMissing, ShardMissing, FileDamaged, ShardDamaged, StreamDamaged])
def test_lost_and_damaged_data_always_has_a_way_out(kind: type[ColdstillError]) -> None:
    assert "\n  do:     " in str(kind("shard 7", found="3 bytes"))
    assert kind("shard 7", fix="copy it").fix == "copy it"


def test_an_error_is_pickled_with_its_class_and_all_its_facts() -> None:
    error = ShardDamaged("rows", found=3, wanted=(4, 5), fix="copy it")
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is ShardDamaged
    assert str(copied) == str(error)
    assert copied.wanted == (4, 5)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one  \ntwo"), "one"),
        (
            RuntimeError("Error(s) in loading X:\n\n\tsize mismatch for y\n\tmore"),
            "Error(s) in loading X: size mismatch for y",
        ),
        (ValueError("nothing follows:"), "nothing follows:"),
        (ValueError(""), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ColdstillError("field", found=3), "field"),
    ],
)
def test_the_first_line_is_one_line_with_text(error: BaseException, line: str) -> None:
    assert first_line(error) == line
