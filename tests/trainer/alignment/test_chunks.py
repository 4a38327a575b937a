"""Laws of tokens as bytes, of chunks, and of the map of ids."""

from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from coldstill.storage_schema.tokenizer import TOKENIZER_FILE
from coldstill.trainer.alignment.chunks import Chunks, align
from coldstill.trainer.alignment.id_map import map_ids
from coldstill.trainer.alignment.token_bytes import ByteText, TokenBytes
from coldstill.trainer.errors import TokenizerNotAligned
from tests.pipeline.sources.families import real

from . import tokenizers_made as made

REAL = real.folders()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from([*made.TEXTS, "\r\n", " ", "é", "世", "🙂", "<s>x", "\u2581", "\u0000"]), max_size=4
).map("".join)


@pytest.fixture(scope="session")
def tokens(tokenizers: dict[str, Path]) -> dict[str, TokenBytes]:
    return {name: read(folder) for name, folder in tokenizers.items()}


def read(folder: Path) -> TokenBytes:
    return TokenBytes((folder / TOKENIZER_FILE).read_bytes(), where=folder.name)


def slow_chunks(one: ByteText, other: ByteText) -> list[tuple[list[int], list[int]]]:
    """Token numbers of each side between common borders, token by token."""
    borders = sorted({0, *one.ends.tolist()} & {0, *other.ends.tolist()})
    return [
        (
            [n for n, end in enumerate(one.ends.tolist()) if start < end <= stop],
            [n for n, end in enumerate(other.ends.tolist()) if start < end <= stop],
        )
        for start, stop in itertools.pairwise(borders)
    ]


def check(one: ByteText, other: ByteText) -> None:
    """The chunks of two tokenizations of one text partition its bytes, and are those of the slow way."""
    found = align(one.starts, one.ends, other.starts, other.ends)
    listed = [
        (np.flatnonzero(found.of_teacher == n).tolist(), np.flatnonzero(found.of_student == n).tolist())
        for n in range(found.number)
    ]
    assert listed == slow_chunks(one, other)
    pieces = []
    for mine, theirs in listed:
        pair = [side.text[side.starts[n[0]] : side.ends[n[-1]]] for side, n in ((one, mine), (other, theirs))]
        assert pair[0] == pair[1]
        pieces.append(pair[0])
    assert b"".join(pieces) == one.text
    # Only a space that a tokenizer puts before the text can be a token without a chunk: it has no byte.
    for side, chunk in ((one, found.of_teacher), (other, found.of_student)):
        assert (side.ends[chunk < 0] == 0).all() or not found.number


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_chunks_partition_the_bytes_of_any_text(tokens: dict[str, TokenBytes], text: str) -> None:
    written = {name: each.encode(text) for name, each in tokens.items()}
    same = {name: each for name, each in written.items() if each.text == text.encode()}
    assert {"bytes", "more bytes"} <= set(same)
    for one, other in itertools.combinations(same.values(), 2):
        check(one, other)


@pytest.mark.parametrize("text", [*made.TEXTS, "", " ", "\r\n", "🙂", " \n"])
def test_the_bytes_of_the_tokens_are_those_of_the_text(
    tokens: dict[str, TokenBytes], tokenizers: dict[str, Path], text: str
) -> None:
    for name, each in tokens.items():
        loaded = PreTrainedTokenizerFast.from_pretrained(tokenizers[name])
        found = each.encode(text)
        assert found.text == text.encode(), name
        assert found.text.decode() == loaded.decode(found.ids, clean_up_tokenization_spaces=False), name
        assert found.ids.tolist() == loaded(text, add_special_tokens=False)["input_ids"]


def test_a_character_may_be_split_between_tokens_of_either_side(tokens: dict[str, TokenBytes]) -> None:
    one, other = tokens["bytes"].encode("a🙂b"), tokens["unigram"].encode("a🙂b")
    assert one.ids.size > 3
    check(one, other)


def test_chunks_of_two_parts_of_one_text_are_those_where_both_have_tokens() -> None:
    """One side begins within a token of the other, and ends before it."""
    found = align(np.array([-2, 1, 3, 7]), np.array([1, 3, 7, 9]), np.array([0, 3, 5]), np.array([3, 5, 7]))
    assert isinstance(found, Chunks)
    assert found.borders.tolist() == [3, 7]
    assert found.of_teacher.tolist() == [-1, -1, 0, -1]
    assert found.of_student.tolist() == [-1, 0, 0]


def test_the_image_of_an_id_is_the_first_token_with_which_the_student_writes_its_bytes(
    tokens: dict[str, TokenBytes],
) -> None:
    """The reference writes the bytes in the middle of a text, where no tokenizer adds a space."""
    split = 0
    for teacher, student in itertools.permutations(tokens.values(), 2):
        found = map_ids(teacher, student, by_role={0: 1})
        assert found[0] == 1
        assert (found[1:] != 1).all()
        theirs = {text: id_ for id_, text in enumerate(student.of_id) if text and not student.special[id_]}
        seen = set()
        for id_ in range(1, teacher.count):
            text, image = teacher.of_id[id_], int(found[id_])
            if teacher.special[id_] or not text:
                assert image == -1
            elif text in theirs:
                # Of several ids of the same bytes, one has the image.
                assert image == -1 or student.of_id[image] == text
                seen.add(text)
            elif image >= 0:
                split += 1
                written = student.encode("a\n" + text.decode())
                assert written.text == b"a\n" + text
                assert image == written.ids[(written.starts == 2).nonzero()[0][-1]]
                assert 0 < len(student.of_id[image]) < len(text)
        images = {student.of_id[image] for image in found[found >= 0].tolist()}
        assert seen <= images | {student.of_id[1]}
    assert split > 300


def test_bytes_that_are_no_text_alone_and_tokens_that_merge_with_the_text_before_have_no_first_token(
    tokens: dict[str, TokenBytes],
) -> None:
    for each in tokens.values():
        assert each.first_ids([b"\xf0\x9f", b"\x80"]).tolist() == [-1, -1]
        assert each.first_ids([]).tolist() == []
    # A sentencepiece model puts a space before a whole text, and none within it.
    pieces = tokens["pieces"]
    (image,) = pieces.first_ids([b"zzz"]).tolist()
    assert pieces.of_id[image] == b"z"


def test_of_two_ids_of_the_same_bytes_the_one_that_text_becomes_is_mapped(tokens: dict[str, TokenBytes]) -> None:
    pieces, plain = tokens["pieces"], tokens["bytes"]
    fallback, written = map(pieces._tokenizer.token_to_id, ("<0x61>", "a"))
    found = map_ids(pieces, plain, by_role={})
    assert found[fallback] == -1
    assert plain.of_id[found[written]] == b"a"


def test_a_tokenizer_that_loses_bytes_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TokenizerNotAligned, match="WordPiece model, whose tokens do not keep each byte"):
        read(made.word_piece(tmp_path))


def test_the_bytes_of_tokens_can_be_sent_to_loader_workers(tokens: dict[str, TokenBytes]) -> None:
    for each in tokens.values():
        copy = pickle.loads(pickle.dumps(each)).encode("a 🙂")
        assert copy.ids.tolist() == each.encode("a 🙂").ids.tolist()
        assert copy.ends.tolist() == each.encode("a 🙂").ends.tolist()


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason=f"{real.VARIABLE} names no folder of tokenizers")
def test_chunks_of_real_tokenizers_partition_the_text() -> None:
    found = {name: read(folder) for name, folder in REAL.items()}
    license_text = Path(os.path.dirname(__file__), "../../../LICENSE").read_text()[:4000]
    for text in [*made.TEXTS, license_text, "x" * 300, "\n\n \t  \r\n" * 5, "🙂" * 9, "한국어 और العربية"]:
        written = [each.encode(text) for each in found.values()]
        assert all(each.text == text.encode() for each in written)
        for one, other in itertools.combinations(written, 2):
            check(one, other)
