"""Laws of recovering the messages of a stored chat from its tokens and the teacher's template."""

from __future__ import annotations

import dataclasses
import itertools
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from coldstill.storage_schema.rows import CachedRow, TeacherTargets, span_positions, spans_from_mask
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE
from coldstill.trainer.alignment.aligned_rows import AlignedRow, RowAligner, RowSkipped, Skipped
from coldstill.trainer.alignment.chat_turns import ChatTurns
from coldstill.trainer.alignment.token_bytes import ByteText, TokenBytes
from coldstill.trainer.errors import TokenizerNotAligned
from tests.pipeline.sources.families import real
from tests.pipeline.sources.families.styles import FAMILIES, Family

from . import tokenizers_made as made

REAL = real.folders()
Side = tuple[TokenBytes, ChatTurns]
CHATS = [
    [("user", "hi\nthere"), ("assistant", "Good\n\nday é.")],
    [("user", "a"), ("assistant", "b b"), ("user", "c"), ("assistant", "d  d <|x|>")],
    [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
]
NO_SYSTEM = {"Gemma 2", "Gemma 3", "Mistral v0.1", "Mixtral", "Mistral Nemo"}
"""Their templates reject a system message, or write it into the user's."""


def turns_of(family: Family) -> ChatTurns:
    tokenizer = family.tokenizer()
    tokens = TokenBytes(tokenizer.backend_tokenizer.to_str().encode(), where=family.name)
    return ChatTurns(tokenizer, tokens, arguments=family.arguments, day=date(2026, 1, 1))


def aligner_of(teacher: Side, student: Side) -> RowAligner:
    """Aligns chats of two tokenizers without special roles and bounds."""
    return RowAligner(
        teacher=teacher[0],
        student=student[0],
        teacher_chat=teacher[1],
        student_chat=student[1],
        begin=None,
        begins=(),
        roles={},
        context=None,
    )


def cut(row: ByteText, count: int) -> ByteText:
    return ByteText(row.ids[:count], row.text[: row.ends[count - 1]], row.ends[:count])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_messages_of_a_chat_are_recovered_from_its_tokens(family: Family) -> None:
    turns = turns_of(family)
    for chat in CHATS[: 2 if family.name in NO_SYSTEM else 3]:
        wanted = [{"role": role, "content": content} for role, content in chat]
        row = turns.render(wanted)
        messages, places = turns.messages(row)
        assert messages == wanted
        assert [row.text[turn.start : turn.stop].decode() for turn in places] == [text for _, text in chat]
        if family.name.startswith(("Qwen2.5", "Llama 3", "Zephyr")):
            end = turns.place_behind(row, places[-1].stop)
            assert row.ids[end] == turns.end_id


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in ("Llama 3", "Qwen2.5", "Zephyr", "Mistral v7")])
def test_a_row_that_was_cut_in_its_last_answer_is_a_proven_beginning(family: Family) -> None:
    turns = turns_of(family)
    chat = [*CHATS[1][:3], ("assistant", "an answer")]
    row = turns.render([{"role": role, "content": content} for role, content in chat])
    for left_out in (1, 2, 4):
        messages, places = turns.messages(cut(row, row.ids.size - left_out))
        assert [message["role"] for message in messages] == [role for role, _ in chat]
        assert chat[-1][1].startswith(messages[-1]["content"])
        assert places[-1].stop <= row.ends[row.ids.size - left_out - 1]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_row_cut_anywhere_gives_messages_without_text_of_the_template(family: Family) -> None:
    if family.name.startswith(("Qwen3", "SmolLM3", "GLM-4.5")):
        pytest.skip("the template writes an empty thought before the last answer only")
    turns = turns_of(family)
    chat = [("user", "one two"), ("assistant", "three four"), ("user", "five six"), ("assistant", "seven 🙂 eight")]
    row = turns.render([{"role": role, "content": content} for role, content in chat])
    first_answer = row.text.index(b"three four") + len(b"three four")
    for count in range(1, row.ids.size + 1):
        part = cut(row, count)
        found = turns.messages(part)
        if len(part.text) >= first_answer:
            assert found is not None, part.text[-40:]
        for message, (role, content) in zip(found[0] if found else (), chat, strict=False):
            assert message["role"] == role
            assert content.startswith(message["content"]), part.text[-40:]


def test_text_that_is_special_on_one_side_only_is_skipped(tokenizers: dict[str, Path]) -> None:
    """The teacher's `</s>` is ordinary text for the student, and the student's `<|im_end|>` for the teacher."""
    sides = {}
    for name in ("bytes", "pieces"):
        tokens = TokenBytes((tokenizers[name] / TOKENIZER_FILE).read_bytes(), where=name)
        sides[name] = tokens, ChatTurns(PreTrainedTokenizerFast.from_pretrained(tokenizers[name]), tokens)
    teacher_chat = sides["pieces"][1]
    aligner = aligner_of(sides["pieces"], sides["bytes"])

    def aligned(question: str, answer: str) -> AlignedRow:
        row = teacher_chat.render([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        targets = dataclasses.replace(
            TeacherTargets.empty(row.ids.size - 1, 1), label_logprob=-np.ones(row.ids.size - 1)
        )
        spans = spans_from_mask(np.arange(row.ids.size) > 0)
        return aligner.align(
            CachedRow(sample_id="row", token_ids=row.ids, target_spans=spans, targets=targets, metadata={})
        )

    assert aligned("a", "the dog").positions.size
    for question, answer in (("a", "the <|im_end|> dog"), ("the </s> dog", "a"), ("the <|im_end|> dog", "a")):
        with pytest.raises(RowSkipped) as caught:
            aligned(question, answer)
        assert caught.value.reason == Skipped.SPECIAL_TOKEN


def test_the_first_token_of_an_answer_is_learned_where_it_holds_a_space_of_the_template(
    tokenizers: dict[str, Path],
) -> None:
    """`[/INST] the`: the student's ` the` is the teacher's `the`, with its log-prob; no target is left out."""
    sides = {}
    for name in ("bytes", "unigram", "pieces"):
        tokens = TokenBytes((tokenizers[name] / TOKENIZER_FILE).read_bytes(), where=name)
        sides[name] = tokens, ChatTurns(PreTrainedTokenizerFast.from_pretrained(tokenizers[name]), tokens)
    for one, other in (("bytes", "unigram"), ("bytes", "pieces"), ("pieces", "bytes"), ("unigram", "bytes")):
        (_, teacher_chat), (student, student_chat) = sides[one], sides[other]
        aligner = aligner_of(sides[one], sides[other])
        answers = ["the weather of the day", "the dog"]
        chat = [(role, text) for answer in answers for role, text in (("user", "a"), ("assistant", answer))]
        row = teacher_chat.render([{"role": role, "content": text} for role, text in chat])
        labels = -np.arange(1.0, row.ids.size)
        targets = dataclasses.replace(TeacherTargets.empty(labels.size, 1), label_logprob=labels)
        spans = spans_from_mask(np.arange(row.ids.size) > 0)
        found = aligner.align(
            CachedRow(sample_id="row", token_ids=row.ids, target_spans=spans, targets=targets, metadata={})
        )
        written = b"".join(student.of_id[id_] for id_ in found.token_ids[found.positions + 1]).decode()
        end = student_chat.end_id
        assert written.replace(" ", "") == "".join(
            answer.replace(" ", "") + (student.of_id[end].decode() if end is not None else "") for answer in answers
        ), (one, other)
        assert found.byte_counts.sum() == sum(map(len, answers))
        # Each teacher's token of an answer counts once.
        wanted = 0.0
        start = 0
        for answer in answers:
            start = row.text.index(answer.encode(), start)
            stop = start + len(answer)
            inside = (row.ends > start) & (row.ends <= stop)
            inside[teacher_chat.place_behind(row, stop)] = True
            wanted += labels[np.flatnonzero(inside) - 1].sum()
        first = np.flatnonzero(np.diff(found.chunk, prepend=-2))
        assert found.chunk_logprob[first].sum() == pytest.approx(wanted)


def test_what_cannot_be_proven_is_not_recovered(tokenizers: dict[str, Path]) -> None:
    folder = tokenizers["bytes"]
    tokens = TokenBytes((folder / TOKENIZER_FILE).read_bytes(), where="the dataset")
    turns = ChatTurns(PreTrainedTokenizerFast.from_pretrained(folder), tokens)
    row = turns.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert turns.messages(row) is not None
    for text in ("plain text", "<|im_start|>user\na<|im_end|>\n", "<|im_start|>tool\na<|im_end|>\n"):
        assert turns.messages(tokens.encode(text)) is None
    # The same text with the end of the turn as ordinary tokens is another row.
    end = turns.place_behind(row, row.text.index(b"b<|") + 1)
    spelled = [tokens._tokenizer.token_to_id(character) for character in "<|im_end|>"]
    assert turns.messages(tokens.read(np.concatenate([row.ids[:end], spelled, row.ids[end + 1 :]]))) is None


def test_a_template_that_is_none_is_a_named_error(tmp_path: Path) -> None:
    folder = made.byte_level(tmp_path, template=None)
    tokens = TokenBytes((folder / TOKENIZER_FILE).read_bytes(), where="the student x")
    with pytest.raises(TokenizerNotAligned, match="chat template of the student x"):
        _ = ChatTurns(PreTrainedTokenizerFast.from_pretrained(folder), tokens).borders


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason=f"{real.VARIABLE} names no folder of tokenizers")
def test_chats_of_real_tokenizers_are_rendered_for_each_other() -> None:
    """Each answer is aligned whole: at most a token at its border is lost, and its end is one token on both sides."""
    sides: dict[str, Side] = {}
    for name in sorted({"llama3_1", "qwen2_5", "gemma3", "mistral_nemo"} & set(REAL)):
        family, tokenizer, _ = real.family_and_tokenizer(name, REAL[name])
        tokens = TokenBytes((REAL[name] / TOKENIZER_FILE).read_bytes(), where=name)
        sides[name] = tokens, ChatTurns(tokenizer, tokens, arguments=family.arguments, day=date(2026, 1, 1))
    for one, other in itertools.permutations(sides, 2):
        (_, teacher_chat), (student, student_chat) = sides[one], sides[other]
        aligner = aligner_of(sides[one], sides[other])
        for texts in itertools.pairwise(made.TEXTS):
            question, answer = (text.strip() for text in texts)
            row = teacher_chat.render([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
            start = row.text.rindex(answer.encode())
            is_target = (row.starts >= start) & (row.ends <= start + len(answer.encode()))
            is_target[teacher_chat.place_behind(row, start + len(answer.encode()))] = True
            spans = spans_from_mask(is_target)
            positions = span_positions(spans)
            targets = dataclasses.replace(
                TeacherTargets.empty(positions.size, 1), label_logprob=-np.ones(positions.size)
            )
            found = aligner.align(
                CachedRow(sample_id="row", token_ids=row.ids, target_spans=spans, targets=targets, metadata={})
            )
            written = b"".join(student.of_id[id_] for id_ in found.token_ids[found.positions[:-1] + 1])
            assert written == answer.encode(), (one, other)
            assert (found.chunk < 0).sum() <= 1
            assert found.token_ids[found.positions[-1] + 1] == student_chat.end_id
            assert found.source[-1] == positions.size - 1


def _of_template(template: str) -> ChatTurns:
    tokenizer = next(family for family in FAMILIES if family.name == "Qwen2.5").tokenizer()
    tokenizer.chat_template = template
    return ChatTurns(tokenizer, TokenBytes(tokenizer.backend_tokenizer.to_str().encode(), where="a stranger"))


def test_a_template_with_thousands_of_possible_cuts_is_rendered_a_bounded_number_of_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it writes between messages is one word repeated, so each beginning of it may be where a row was cut."""
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ 'ab ' * SIZE }}{% endfor %}"
    turns = _of_template(template.replace("SIZE", "300"))
    row = turns.render([{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}])
    _ = turns.borders
    calls = []
    monkeypatch.setattr(ChatTurns, "render", lambda _, messages: calls.append(messages) or 1 / 0)
    assert turns.messages(cut(row, row.ids.size - 7)) is None
    assert 2 <= len(calls) <= 64
    monkeypatch.undo()
    with pytest.raises(TokenizerNotAligned, match="bytes around a message"):
        _ = _of_template(template.replace("SIZE", "6000")).borders


def test_a_row_of_very_many_messages_has_no_split() -> None:
    turns = _of_template("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}")
    chat = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    assert turns.messages(turns.render(chat * 40)) is not None
    assert turns.messages(turns.render(chat * 600)) is None


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3.5", "SmolLM3"])
def test_a_row_cut_behind_an_answer_that_was_not_the_last_is_skipped_by_name(name: str) -> None:
    """The template writes an empty thought into the last answer only. Without the next turn, the row shows an answer
    that is the last one and has none, which no chat renders to."""
    turns = turns_of(next(family for family in FAMILIES if family.name == name))
    chat = [("user", "one two"), ("assistant", "three four"), ("user", "five six"), ("assistant", "seven eight")]
    row = turns.render([{"role": role, "content": content} for role, content in chat])
    aligner = aligner_of((turns._tokens, turns), (turns._tokens, turns))

    def aligned(text: bytes) -> AlignedRow:
        part = cut(row, int(np.searchsorted(row.ends, row.text.index(text) + len(text))) + 1)
        targets = TeacherTargets.empty(part.ids.size - 1, 1)
        spans = spans_from_mask(np.arange(part.ids.size) > 0)
        targets = dataclasses.replace(targets, label_logprob=-np.ones(part.ids.size - 1))
        return aligner.align(
            CachedRow(sample_id="row", token_ids=part.ids, target_spans=spans, targets=targets, metadata={})
        )

    for end in (b"three four", b"three four<|im_end|>\n"):
        with pytest.raises(RowSkipped) as caught:
            aligned(end)
        assert caught.value.reason == Skipped.CHAT_NOT_RECOVERED
    for end in (b"five six", b"seven", b"seven eight"):
        assert aligned(end).positions.size
