"""Laws of the student's targets: which stored number each comes from, and what they add up to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("student", ["more bytes", "pieces", "unigram"])
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
            assert not of_template or (kind == "chat" and student != "more bytes")
            text = text[of_template:]
            run = run_of(text, row, stored, aligner.teacher.special, begin=place, is_end=is_end)
            place = run.stop
            wanted = sum(labels[target_of[n]] for n in run)
            np.testing.assert_allclose(aligned.chunk_logprob[numbers], wanted, rtol=1e-12)
            single = len(run) == 1 and len(numbers) == 1
            assert aligned.source[numbers].tolist() == ([target_of[run.start]] if single else [-1] * len(numbers))
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


def test_the_target_of_each_mapped_id_in_the_tail_is_unbiased(datasets, students) -> None:
    """With each tail id drawn as often as its probability says, `tail * weight` at an id is the teacher's probability.

    The weights are linear in the draws, so this is the mean over all captures.
    """
    collate = collator(datasets["text"], students["more bytes"])
    row, probs = dense_row(collate, draws=0, top_k=4, seed=0)
    parts = []
    for at, p in enumerate(probs):
        tail = np.setdiff1d(np.flatnonzero(p), row.targets.ids[at])
        parts.append(np.repeat(tail, np.round(64 * p[tail]).astype(int)))
    drawn = dataclasses.replace(
        row.targets,
        draw_ids=np.concatenate(parts).astype(np.int32),
        draw_counts=np.array([part.size for part in parts], np.int32),
    )
    row = dataclasses.replace(row, targets=drawn)
    targets = collate.collate([row], [0], top_k=None)["targets"]
    source = collate.aligners[0].align(row).source
    mass = targets.draw_weights.double() * targets.log_tail.double().exp()[:, None]
    found = torch.zeros(targets.count, collate.aligners[0].student.count, dtype=torch.float64)
    found.scatter_add_(1, targets.draws, mass)
    compared = 0
    for number in torch.nonzero(targets.exact)[:, 0].tolist():
        wanted = np.zeros(found.shape[1])
        for id_ in set(parts[source[number]].tolist()):
            if collate.id_map[id_] >= 0:
                wanted[collate.id_map[id_]] = probs[source[number], id_]
                compared += 1
        np.testing.assert_allclose(found[number].numpy(), wanted, rtol=1e-4, atol=1e-9)
    assert compared > 100


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
