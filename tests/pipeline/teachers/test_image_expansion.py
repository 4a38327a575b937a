"""Laws of the positions of rows with images, against a reference that walks over tokens one by one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.teachers.answer_sampling import answer_sequence
from coldstill.pipeline.teachers.image_expansion import (
    Expansion,
    ImageRules,
    RowRejected,
    as_stored,
    check_length,
    check_no_images,
    images_of,
    unsupported,
)
from coldstill.pipeline.teachers.protocol import StoredRow, TokenSequence
from coldstill.pipeline.teachers.target_extractor import draw_uniforms
from coldstill.pipeline.teachers.vllm.scoring import TappedRequest, TapSettings
from coldstill.storage_schema.rows import span_positions, spans_from_mask
from tests import vision
from tests.pipeline.teachers.image_rows import medium

PLACEHOLDER, PATCH, WRAPPER = 90, 91, 92
SETTINGS = TapSettings(top_k=2, min_prob=0.0, draws=5, kept_draws=5, draw_logprobs=False, draw_seed=7, token_count=100)


def _rules(max_images: int = 9) -> ImageRules:
    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda token: PLACEHOLDER, unk_token_id=None)
    processor = SimpleNamespace(image_token="<image>", tokenizer=tokenizer, image_token_ids=[PATCH, None])
    return ImageRules(processor, max_images=max_images)


class Case(NamedTuple):
    sequence: TokenSequence
    expanded: list[int]
    ranges: list[tuple[int, int]]
    last: list[int]  # of each stored token, the place of the last token that it became


@st.composite
def cases(draw: Any) -> Case:
    """Rows of text tokens and images; an image becomes 1 to 6 tokens, of text, wrappers, patches or placeholders."""
    parts = draw(st.lists(st.one_of(st.integers(0, 80), st.none()), min_size=2, max_size=24))
    stored, expanded, ranges, last = [], [], [], []
    for part in parts:
        if part is None:
            inside = draw(st.lists(st.sampled_from([PLACEHOLDER, PATCH, WRAPPER, 3]), min_size=1, max_size=6))
            ranges.append((len(expanded), len(inside)))
            expanded += inside
            stored.append(PLACEHOLDER)
        else:
            expanded.append(part)
            stored.append(part)
        last.append(len(expanded) - 1)
    token_ids = np.array(stored, np.int32)
    labels = np.array(draw(st.lists(st.booleans(), min_size=len(stored), max_size=len(stored))))
    labels[0] = False
    labels &= token_ids != PLACEHOLDER
    media = tuple(medium(int(at), b"") for at in np.flatnonzero(token_ids == PLACEHOLDER))
    spans = spans_from_mask(labels)
    sequence = TokenSequence(sample_id="a", source_row=0, token_ids=token_ids, target_spans=spans, media=media)
    return Case(sequence, expanded, ranges, last)


@given(cases())
def test_positions_spans_and_labels_are_those_of_a_walk_over_the_tokens(case: Case) -> None:
    rules = _rules()
    if len(case.ranges) <= 9:
        rules.check_row(case.sequence)
    expansion = rules.proven(case.sequence, case.expanded, case.ranges)
    stored = np.arange(case.sequence.token_ids.size)
    assert expansion.positions(stored).tolist() == case.last
    wanted = [case.last[position] for position in span_positions(case.sequence.target_spans)]
    spans = expansion.spans(case.sequence.target_spans)
    assert [position for start, stop in spans for position in range(start, stop)] == wanted
    labels = case.sequence.token_ids[span_positions(case.sequence.target_spans) + 1].tolist()
    assert [case.expanded[position + 1] for position in wanted] == labels


@given(cases())
def test_draws_are_those_of_stored_positions(case: Case) -> None:
    """So that a row has equal draws with every engine, whatever an image becomes there."""
    expansion = _rules().proven(case.sequence, case.expanded, case.ranges)
    spans = case.sequence.target_spans
    request = TappedRequest(
        {
            "number": 0,
            "sample_id": "a",
            "spans": expansion.spans(spans),
            "stored_starts": spans[:, 0].tolist(),
        },
        prompt=case.expanded,
        settings=SETTINGS,
    )
    positions = span_positions(spans)
    uniforms = draw_uniforms(positions, draws=5, seed=7, sample_id="a")
    np.testing.assert_array_equal(request.uniforms(slice(None)), uniforms)
    assert request.labels(slice(None)).tolist() == case.sequence.token_ids[positions + 1].tolist()
    answered = TappedRequest(
        {"number": 0, "sample_id": "a", "max_answer_tokens": 3, "stored_starts": [case.sequence.token_ids.size - 1]},
        prompt=case.expanded,
        settings=SETTINGS,
    )
    assert answered.positions.tolist() == [len(case.expanded) - 1 + n for n in range(3)]
    after = case.sequence.token_ids.size - 1 + np.arange(3)
    np.testing.assert_array_equal(answered.uniforms(slice(None)), draw_uniforms(after, draws=5, seed=7, sample_id="a"))


@given(cases(), st.data())
def test_one_changed_token_or_range_has_no_proof(case: Case, data: st.DataObject) -> None:
    """But inside of an image, where the tokens are the family's own."""
    rules = _rules()
    place = data.draw(st.integers(0, len(case.expanded) - 1))
    inside = any(offset <= place < offset + length for offset, length in case.ranges)
    changed = [*case.expanded]
    changed[place] += 1
    faults = [] if inside else [(changed, case.ranges)]
    faults.append(([*case.expanded, 7], case.ranges))
    if case.ranges:
        number = data.draw(st.integers(0, len(case.ranges) - 1))
        offset, length = case.ranges[number]
        faults.append((case.expanded, [*case.ranges[:number], *case.ranges[number + 1 :]]))
        # An image that is moved, where the neighbors are no image's, or one that is longer.
        for wrong in ((offset, length + 1), (offset, 0), (offset + len(case.expanded), length), (-1, length)):
            faults.append((case.expanded, [*case.ranges[:number], wrong, *case.ranges[number + 1 :]]))
    for expanded, ranges in faults:
        with pytest.raises(RowRejected) as rejected:
            rules.proven(case.sequence, expanded, ranges)
        assert rejected.value.reason is RejectReason.PLACEHOLDERS_DIFFER


def _row(token_ids: list[int], media: list[int], spans: list[list[int]]) -> TokenSequence:
    return TokenSequence(
        sample_id="a",
        source_row=4,
        token_ids=np.array(token_ids, np.int32),
        target_spans=np.array(spans, np.int32).reshape(-1, 2),
        media=tuple(medium(position, vision.image_bytes(position)) for position in media),
    )


GOOD = ([1, PLACEHOLDER, 2, PLACEHOLDER, 3, 4], [1, 3], [[1, 2], [3, 5]])


@pytest.mark.parametrize(
    ("token_ids", "media", "spans", "reason"),
    [
        (GOOD[0], [1], GOOD[2], RejectReason.PLACEHOLDERS_DIFFER),
        (GOOD[0], [], GOOD[2], RejectReason.PLACEHOLDERS_DIFFER),
        (GOOD[0], [1, 3, 4], GOOD[2], RejectReason.PLACEHOLDERS_DIFFER),
        (GOOD[0], [0, 2], GOOD[2], RejectReason.PLACEHOLDERS_DIFFER),
        (GOOD[0], [3, 1], GOOD[2], RejectReason.PLACEHOLDERS_DIFFER),
        ([1, PLACEHOLDER, 2, PLACEHOLDER, PATCH, 4], [1, 3], GOOD[2], RejectReason.PLACEHOLDERS_DIFFER),
        (GOOD[0], GOOD[1], [[2, 5]], RejectReason.PLACEHOLDERS_DIFFER),
        ([PLACEHOLDER] * 3 + [1], [0, 1, 2], [[2, 3]], RejectReason.TOO_MANY_IMAGES),
    ],
)
def test_a_row_whose_images_do_not_belong_to_it_is_rejected(
    token_ids: list[int], media: list[int], spans: list[list[int]], reason: RejectReason
) -> None:
    rules = _rules(max_images=2)
    rules.check_row(_row(*GOOD))
    with pytest.raises(RowRejected) as rejected:
        rules.check_row(_row(token_ids, media, spans))
    assert rejected.value.reason is reason


def test_an_answer_without_tokens_of_images_keeps_the_images_of_its_prompt() -> None:
    prompt = _row(GOOD[0], GOOD[1], [])
    answer = answer_sequence(prompt, [5, 6], number=0, answers=1, finish_reason="stop")
    assert answer.media == prompt.media
    _rules().check_row(answer)
    _rules().check_answer([5, 6])
    for token in (PLACEHOLDER, PATCH):
        with pytest.raises(RowRejected, match="an answer that holds a token of images"):
            _rules().check_answer([5, token])


@pytest.mark.parametrize(("size", "is_prompt", "fits"), [(9, False, True), (10, False, True), (10, True, False)])
def test_a_row_may_be_as_long_as_the_maximum_and_a_prompt_leaves_room(size: int, is_prompt: bool, fits: bool) -> None:
    expansion = Expansion(np.arange(size), np.array([1]), np.array([4]))
    row, config = _row(GOOD[0], GOOD[1], []), TeacherConfig(model="any", max_length=10)
    if fits:
        check_length(row, expansion, config=config, is_prompt=is_prompt)
        with pytest.raises(RowRejected, match="11 tokens, 4 of them of 1 images; at most 10") as long:
            check_length(row, expansion._replace(token_ids=np.arange(11)), config=config, is_prompt=is_prompt)
        assert long.value.reason is RejectReason.OVER_LONG
    else:
        with pytest.raises(RowRejected) as full:
            check_length(row, expansion, config=config, is_prompt=is_prompt)
        assert full.value.reason is RejectReason.NO_ROOM


@pytest.mark.parametrize(
    ("read", "stored", "reason"),
    [
        (20, 10, None),
        (21, 10, RejectReason.TEACHER_OVER_LONG),
        (20, 11, RejectReason.OVER_LONG),
        (6, 11, RejectReason.OVER_LONG),
    ],
)
def test_with_a_prompt_of_the_teachers_own_each_side_has_its_bound(
    read: int, stored: int, reason: RejectReason | None
) -> None:
    """An image of four tokens: both sides have three more tokens than they store."""
    config = TeacherConfig(model="any", max_length=10, max_read_length=20)
    theirs = _row(GOOD[0], GOOD[1], [])
    theirs = replace(
        theirs,
        token_ids=np.zeros(read - 3, np.int32),
        stored=StoredRow(np.zeros(stored - 3, np.int32), theirs.target_spans, theirs.media),
    )
    expansion = Expansion(np.arange(read), np.array([1]), np.array([4]))
    if reason is None:
        check_length(theirs, expansion, config=config, is_prompt=False)
    else:
        with pytest.raises(RowRejected) as long:
            check_length(theirs, expansion, config=config, is_prompt=False)
        assert long.value.reason is reason


def test_images_that_cannot_be_decoded_are_named_as_a_source_names_them() -> None:
    good = _row(*GOOD)
    assert [image.mode for image in images_of(good)] == ["RGB", "RGB"]
    for data, reason in (
        (b"GIF", RejectReason.IMAGE_UNREADABLE),
        (vision.image_bytes(0, mode="I;16"), RejectReason.IMAGE_UNSUPPORTED),
        (bytes((64 << 20) + 1), RejectReason.IMAGE_TOO_LARGE),
    ):
        bad = TokenSequence(
            sample_id="a",
            source_row=4,
            token_ids=good.token_ids,
            target_spans=good.target_spans,
            media=(good.media[0], medium(3, data)),
        )
        with pytest.raises(RowRejected, match=r"^image 1: ") as rejected:
            images_of(bad)
        assert rejected.value.reason is reason
        assert rejected.value.of(bad)[:3] == ("a", 4, reason)


def test_a_detail_has_nothing_of_one_machine() -> None:
    error = ValueError("cannot read </tmp/x y> in /home/me/file.py or C:\\work\\file at 0x7f12ab: ratio 1/2 of 3:4")
    assert unsupported(error).detail.endswith("in ... or ... at ...: ratio 1/2 of 3:4")


def test_a_teacher_of_text_rejects_images_and_nothing_else() -> None:
    text = _row([1, PLACEHOLDER, PATCH], [], [[0, 2]])
    check_no_images(text)
    assert as_stored(text).spans(text.target_spans) == [[0, 2]]
    with pytest.raises(RowRejected, match="no processor"):
        check_no_images(_row(*GOOD))
