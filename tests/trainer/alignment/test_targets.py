"""Laws of the student's targets: which stored number each comes from, and what they add up to."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from coldstill import load_logit_dataset
from coldstill.storage_schema.rows import CachedRow, span_positions, spans_from_mask
from coldstill.trainer.alignment.collator import AlignedCollator, collator_of
from coldstill.trainer.alignment.targets import AlignedTargets, collate_aligned
from coldstill.trainer.alignment.token_bytes import ByteText
from coldstill.trainer.config import StudentConfig
from coldstill.trainer.data.subsample import with_smaller_top_k
from coldstill.trainer.student.tokenizer import other_tokenizer
from tests import making

from . import tokenizers_made as made


def collator(dataset: Path, student: Path, *, context: int | None = None) -> AlignedCollator:
    loaded = load_logit_dataset(dataset)
    found = other_tokenizer(StudentConfig(model=str(student)), loaded)
    return collator_of(loaded, found, context=context)


def rows_of(kind: str, tokenizer: Path) -> list[CachedRow]:
    return (made.text_rows if kind == "text" else made.chat_rows)(tokenizer)


def run_of(text: bytes, row: CachedRow, stored: ByteText, special: np.ndarray, *, begin: int, is_end: bool) -> range:
    """The first run of the teacher's target tokens from number `begin` on that writes `text`, or is one end token."""
    is_target = np.zeros(row.token_ids.size, bool)
    is_target[row.positions + 1] = True
    for start in range(begin, row.token_ids.size):
        for stop in range(start + 1, min(start + 40, row.token_ids.size) + 1):
            if not is_target[start:stop].all():
                break
            if is_end and stop == start + 1 and special[row.token_ids[start]]:
                return range(start, stop)
            written = stored.text[stored.starts[start] : stored.ends[stop - 1]]
            if not is_end and written == text and not special[row.token_ids[start:stop]].any():
                return range(start, stop)
    raise AssertionError(f"no run of target tokens writes {text!r}")


@pytest.mark.parametrize("student", ["more bytes", "fewer bytes", "pieces", "unigram"])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_each_target_of_the_student_follows_from_stored_targets_of_the_same_bytes(
    kind: str, student: str, datasets: dict[str, Path], tokenizers: dict[str, Path], students: dict[str, Path]
) -> None:
    """Token by token, from the definitions: bytes of a chunk are equal, and its log-prob is the sum of the labels'."""
    collate = collator(datasets[kind], students[student])
    aligner = collate.aligners[0]
    covered = total = 0
    for row in rows_of(kind, tokenizers["bytes"]):
        aligned = aligner.align(row)
        stored = aligner.teacher.read(row.token_ids)
        labels = row.targets.label_logprob.astype(np.float64)
        target_of = {int(position) + 1: n for n, position in enumerate(row.positions)}
        place = 0
        for chunk in dict.fromkeys(aligned.chunk.tolist()):
            numbers = np.flatnonzero(aligned.chunk == chunk).tolist()
            ids = [int(aligned.token_ids[aligned.positions[n] + 1]) for n in numbers]
            text = b"".join(aligner.student.of_id[id_] for id_ in ids)
            total += len(numbers)
            if chunk < 0:
                assert (aligned.source[numbers] < 0).all()
                continue
            covered += len(numbers)
            is_end = bool(aligner.student.special[ids[0]])
            # The first token of an answer may hold a space of the student's template.
            of_template = 0 if is_end else len(text) - int(aligned.byte_counts[numbers].sum())
            assert text[:of_template] == (b" " if of_template else b"")
            assert not of_template or (kind == "chat" and "bytes" not in student)
            text = text[of_template:]
            run = run_of(text, row, stored, aligner.teacher.special, begin=place, is_end=is_end)
            place = run.stop
            wanted = sum(labels[target_of[n]] for n in run)
            np.testing.assert_allclose(aligned.chunk_logprob[numbers], wanted, rtol=1e-12)
            first = target_of[run.start] if len(run) == 1 else -1
            assert aligned.source[numbers].tolist() == [first, *[-1] * (len(numbers) - 1)]
            assert aligned.byte_counts[numbers].sum() == (0 if is_end else len(text))
    assert covered > 0.9 * total


def dense_row(collate: AlignedCollator, *, draws: int, top_k: int, seed: int) -> tuple[CachedRow, np.ndarray]:
    """A row of text whose teacher's distributions are known in full, as sixty-fourths; they are returned too."""
    teacher = collate.aligners[0].teacher
    ids = teacher.encode(made.TEXTS[0]).ids.astype(np.int32)
    random = np.random.default_rng(seed)
    probs = random.multinomial(64, np.full(teacher.count, 1 / teacher.count), size=ids.size - 1) / 64
    spans = spans_from_mask(np.arange(ids.size) > 0)
    positions = span_positions(spans)
    safe = np.where(probs > 0, probs, 1e-30)
    targets = making.targets_of(safe, ids[positions + 1], top_k=top_k, draws=draws, seed=seed)
    row = CachedRow(sample_id="row", token_ids=ids, target_spans=spans, targets=targets, metadata={})
    return row, probs


def test_mass_is_kept_and_ids_without_an_image_join_the_tail(datasets, students) -> None:
    collate = collator(datasets["text"], students["more bytes"])
    row, probs = dense_row(collate, draws=6, top_k=12, seed=0)
    aligned = collate.aligners[0].align(row)
    targets: AlignedTargets = collate.collate([row], [0], top_k=None)["targets"]
    assert targets.exact.any()
    assert (~targets.exact).any()
    for number in torch.nonzero(targets.exact)[:, 0].tolist():
        p, at = probs[aligned.source[number]], aligned.source[number]
        stored = {int(i) for i, kept in zip(row.targets.ids[at], row.targets.kept[at], strict=True) if kept}
        wanted = {int(collate.id_map[i]): p[i] for i in stored if collate.id_map[i] >= 0 and p[i] > 0}
        kept = targets.kept[number]
        found = dict(
            zip(targets.ids[number][kept].tolist(), targets.logprobs[number][kept].exp().tolist(), strict=True)
        )
        found = {id_: mass for id_, mass in found.items() if mass > 1e-20}
        assert found == pytest.approx(wanted, rel=1e-5)
        assert targets.log_tail[number].exp().item() == pytest.approx(1 - sum(wanted.values()), rel=1e-4, abs=1e-6)
        assert set(targets.ids[number].tolist()) <= set(targets.ids[number][kept].tolist())
        drawn = targets.draw_weights[number] > 0
        assert not set(targets.draws[number][drawn].tolist()) & set(found)
        assert targets.draw_weights[number].sum() <= 1 + 1e-6
    assert (targets.logprobs.exp().sum(1)[~targets.exact] == 1).all()


def images_of(teacher: Path, student: Path) -> dict[int, int]:
    """The first id with which the student's tokenizer writes each of the teacher's ids; both are byte-level BPE."""
    mine, theirs = (PreTrainedTokenizerFast.from_pretrained(folder) for folder in (teacher, student))
    known, found = theirs.get_vocab(), {mine.eos_token_id: theirs.eos_token_id}
    for token, id_ in mine.get_vocab().items():
        if id_ in mine.added_tokens_decoder:
            continue
        if token in known:
            found[id_] = known[token]
        elif "\ufffd" not in mine.decode([id_]):
            found[id_] = theirs(mine.decode([id_]), add_special_tokens=False)["input_ids"][0]
    return found


@pytest.mark.parametrize("student", ["more bytes", "fewer bytes"])
@pytest.mark.parametrize("drawn", [False, True], ids=["kept ids", "draws too"])
def test_the_target_of_a_token_is_all_mass_of_the_texts_that_begin_with_it(
    student: str, drawn: bool, datasets, students, tokenizers
) -> None:
    """With each tail id drawn as often as its probability says, it is exact for every token, tail included. Not all
    draws join a kept id here: then the targets are linear in the draws, so this is the mean over all captures."""
    collate = collator(datasets["text"], students[student])
    row, probs = dense_row(collate, draws=0, top_k=4 if drawn else 30, seed=0)
    parts = []
    for at, p in enumerate(probs):
        tail = np.setdiff1d(np.flatnonzero(p), row.targets.ids[at])
        parts.append(np.repeat(tail, np.round(64 * p[tail]).astype(int)) if drawn else tail[:0])
    targets = dataclasses.replace(
        row.targets,
        draw_ids=np.concatenate(parts).astype(np.int32),
        draw_counts=np.array([part.size for part in parts], np.int32),
    )
    row = dataclasses.replace(row, targets=targets)
    images = images_of(tokenizers["bytes"], tokenizers[student])
    aligned = collate.aligners[0].align(row)
    found = collate.collate([row], [0], top_k=None)["targets"]
    mass = torch.zeros(found.count, collate.aligners[0].student.count, dtype=torch.float64)
    mass.scatter_add_(1, found.ids, found.logprobs.double().exp())
    mass.scatter_add_(1, found.draws, found.draw_weights.double() * found.log_tail.double().exp()[:, None])
    compared = joined = 0
    for number in torch.nonzero(found.exact)[:, 0].tolist():
        at = aligned.source[number]
        wanted = np.zeros(mass.shape[1])
        for id_ in {*row.targets.ids[at].tolist(), *parts[at].tolist()}:
            if id_ in images:
                joined += wanted[images[id_]] > 0
                wanted[images[id_]] += probs[at, id_]
                compared += 1
        np.testing.assert_allclose(mass[number].numpy(), wanted, rtol=1e-4, atol=1e-9)
        kept, drawn_here = found.kept[number], found.draw_weights[number] > 0
        total = found.logprobs[number][kept].exp().sum() + found.log_tail[number].exp()
        assert total.item() == pytest.approx(1, rel=1e-5)
        assert not set(found.ids[number][kept].tolist()) & set(found.draws[number][drawn_here].tolist())
    assert compared > 100
    assert (joined > 0) == (student == "fewer bytes")


@pytest.mark.parametrize("student", ["more bytes", "fewer bytes"])
def test_a_first_token_and_the_rest_of_its_chunk_have_the_probability_of_the_teachers_token(
    student: str, datasets, students, tokenizers
) -> None:
    collate = collator(datasets["text"], students[student])
    images = images_of(tokenizers["bytes"], tokenizers[student])
    split = 0
    for row in made.text_rows(tokenizers["bytes"], 8):
        aligned = collate.aligners[0].align(row)
        found = collate.collate([row], [0], top_k=None)["targets"]
        for number in torch.nonzero(found.exact)[:, 0].tolist():
            at = int(aligned.source[number])
            text = row.targets.label_logprob[at].item()
            label = int(row.token_ids[row.positions[at] + 1])
            ids, logprobs = row.targets.ids[at].tolist(), row.targets.logprobs[at].tolist()
            begins = sum(math.exp(p) for id_, p in zip(ids, logprobs, strict=True) if images.get(id_) == images[label])
            begins += 0 if label in ids else math.exp(text)
            assert found.label_logprob[number].item() == pytest.approx(math.log(begins), rel=1e-5, abs=1e-6)
            rest = torch.nonzero((found.chunk == found.chunk[number]) & ~found.exact)[:, 0]
            split += len(rest) > 0
            assert not len(rest) or rest[0] == number + 1
            for one in rest.tolist():
                wanted = text - math.log(begins)
                assert found.chunk_logprob[one].item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert (split > 20) == (student == "fewer bytes")


def test_a_tail_whose_draws_all_join_kept_ids_keeps_mass(datasets, students, tokenizers) -> None:
    """Losses take the log of the tail: of n draws that all join, n / (n + 1) of its mass does."""
    collate = collator(datasets["text"], students["fewer bytes"])
    row, _ = dense_row(collate, draws=2, top_k=30, seed=1)
    images = images_of(tokenizers["bytes"], tokenizers["fewer bytes"])
    row_targets, starts = row.targets, np.cumsum([0, *row.targets.draw_counts])
    found = collate.collate([row], [0], top_k=None)["targets"]
    aligned, whole = collate.aligners[0].align(row), 0
    for number in torch.nonzero(found.exact)[:, 0].tolist():
        at = int(aligned.source[number])
        kept = {images.get(id_) for id_ in row_targets.ids[at].tolist()} - {None}
        draws = [images.get(id_) for id_ in row_targets.draw_ids[starts[at] : starts[at + 1]].tolist()]
        if draws and set(draws) <= kept:
            least = row_targets.log_tail[at] - math.log(len(draws) + 1)
            assert found.log_tail[number].item() >= least - 1e-4
            whole += 1
    assert whole > 0


def test_a_smaller_top_k_is_taken_before_the_ids_are_mapped(datasets, tokenizers, students) -> None:
    collate = collator(datasets["text"], students["more bytes"])
    rows = made.text_rows(tokenizers["bytes"], 4)
    aligned = [collate.aligners[0].align(row) for row in rows]
    found = collate_aligned(rows, aligned, collate.id_map, top_k=3)["targets"]
    for number, (row, each) in enumerate(zip(rows, aligned, strict=True)):
        reduced = with_smaller_top_k(row.targets, 3)
        mine = torch.nonzero(found.exact & (found.row == number))[:, 0]
        for n in mine.tolist():
            at = each.source[(each.positions == found.position[n].item()).nonzero()[0][0]]
            ids = collate.id_map[reduced.targets.ids[at]]
            assert set(found.ids[n].tolist()) == set(ids[ids >= 0].tolist())


def test_parts_for_the_head_split_no_chunk(datasets, tokenizers, students) -> None:
    collate = collator(datasets["text"], students["unigram"])
    targets = collate.collate(made.text_rows(tokenizers["bytes"], 6), [0] * 6, top_k=None)["targets"]
    for size in (1, 2, 7, 50, 10_000):
        parts = targets.borders(size)
        assert [stop for _, stop in parts[:-1]] == [start for start, _ in parts[1:]]
        assert (parts[0][0], parts[-1][1]) == (0, targets.count)
        for start, stop in parts:
            inside = targets.chunk[start:stop]
            outside = torch.cat([targets.chunk[:start], targets.chunk[stop:]])
            assert not set(inside[inside >= 0].tolist()) & set(outside.tolist())
            alone = set(inside.tolist())
            assert stop - start <= size or len(alone) == 1


def test_skipped_rows_stay_in_the_batch_without_targets_and_are_named(datasets, tokenizers, students) -> None:
    teacher = tokenizers["bytes"]
    rows = made.text_rows(teacher, 3)
    broken = made.text_row(9, [5, 1, 5, 6], np.arange(4) > 0, vocabulary=64)  # a turn's begin within a text
    cut = made.text_row(10, [0xC3 - 0xC3 + 3 + 188, 6], np.arange(2) > 0, vocabulary=64)
    collate = collator(datasets["text"], students["more bytes"])
    batch = collate.collate([rows[0], broken, rows[1]], [0, 0, 0], top_k=None)
    assert batch["skipped"] == [("row-9", "it has a special token in its text, or text that is one for the student")]
    assert 1 not in batch["target_samples"].tolist()
    assert batch["attention_mask"][1].tolist()[:2] == [1, 0]
    assert batch["sample_ids"] == ["row-0", "row-9", "row-1"]
    whole = collate.collate([rows[0], rows[1]], [0, 0], top_k=None)["targets"]
    for name in ("ids", "logprobs", "log_tail", "labels", "draws", "draw_weights", "exact", "chunk", "chunk_logprob"):
        torch.testing.assert_close(getattr(batch["targets"], name), getattr(whole, name), rtol=0, atol=0)
    assert collate.collate([broken], [0], top_k=None)["targets"].count == 0
    assert collate.collate([cut], [0], top_k=None)["targets"].count <= 1
    short = collator(datasets["text"], students["more bytes"], context=8)
    assert short.collate(rows, [0] * 3, top_k=None)["skipped"][0][1].startswith("it has more tokens of the student")
