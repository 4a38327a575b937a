"""Captures in DistillKit's layout, made by the slow writer of `peers.py`, become datasets with the same values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import HeaderMismatch, InvalidHeader
from coldstill.tools.errors import (
    AlignmentDoubtful,
    CompressionUnknown,
    NotFullSoftmax,
    SourceUnreadable,
    UnusableRow,
)
from coldstill.tools.exchange import distillkit_rows
from coldstill.tools.exchange.derived_targets import MIN_TAIL
from coldstill.tools.exchange.distillkit_compression import unpack_stream
from coldstill.tools.exchange.distillkit_import import import_distillkit
from coldstill.tools.exchange.distillkit_rows import LAYOUTS
from coldstill.tools.exchange.settings import DistillKitSettings
from coldstill.tools.verify import verify
from tests.tools.exchange import peers

STATED = {"assume_aligned": True, "normalized_over": "vocabulary"}
"""A few rows show no alignment, and the curves of a compressor show no tail: the tests of those state nothing."""


def run(source: Path, output: Path, tokenizer: Path, **changes: Any) -> Any:
    """The import, quietly, and its dataset."""
    fields = {"tokenizer": tokenizer, "teacher": "peer/teacher", "fidelity": "exact", **STATED, **changes}
    import_distillkit(source, output, DistillKitSettings.model_validate(fields), progress=False)
    return open_dataset(output)


def capture(folder: Path, config: dict[str, Any], count: int = 3, **changes: Any) -> list[peers.Sequence]:
    """A capture of `count` texts in `folder`."""
    texts = peers.sequences(count)
    peers.write_distillkit(folder, [peers.distillkit_row(one, config, **changes) for one in texts], config, per_file=2)
    return texts


def expected(logprobs: np.ndarray, config: dict[str, Any]) -> tuple[dict[int, float], float]:
    """Kept ids with their probabilities, and the tail, of one position: the rules of the import in plain Python."""
    ids, values = peers.top(logprobs, config["k"])
    exact = config["exact_k"]
    if "polynomial_degree" in config:
        means = peers.encode_legacy(values, config)[2]
    else:
        means = peers.encode_position(values, config)[1]
    if exact:
        means = means[:exact] + [min(value, means[exact - 1]) for value in means[exact:]]
    probs = [math.exp(value) for value in means]
    room = max(1 - sum(probs[:exact]) - MIN_TAIL, MIN_TAIL)
    if sum(probs[exact:]) > room:
        probs[exact:] = [value * room / sum(probs[exact:]) for value in probs[exact:]]
    tail = max(1 - sum(probs), MIN_TAIL)
    total = sum(probs) + tail
    return {i: value / total for i, value in zip(ids, probs, strict=True)}, tail / total


@pytest.mark.parametrize("config", [peers.ARCEE_128, peers.ARCEE_50, peers.ALL_EXACT, peers.LEGACY])
def test_position_t_of_the_import_predicts_token_t_plus_1(
    config: dict[str, Any], tmp_path: Path, wide_tokenizer: Path
) -> None:
    texts = capture(tmp_path / "capture", config)
    dataset = run(tmp_path / "capture", tmp_path / "out", wide_tokenizer)
    assert len(dataset) == len(texts)
    assert dataset.header.top_k == config["k"]
    assert (dataset.header.mode, dataset.header.tail, dataset.header.loss_on) == ("imported", "derived", "given")
    for text, row in zip(texts, dataset.rows(), strict=True):
        assert row.token_ids.tolist() == text.tokens.tolist()
        assert row.target_spans.tolist() == [[0, text.tokens.size - 1]]
        for n, t in enumerate(row.positions):
            kept, tail = expected(text.logprobs[t], config)
            found = dict(zip(row.targets.ids[n].tolist(), row.targets.logprobs[n].tolist(), strict=True))
            assert set(found) == set(kept)
            for token, probability in kept.items():
                assert math.exp(found[token]) == pytest.approx(probability, rel=0.01, abs=1e-6)
            assert math.exp(row.targets.log_tail[n]) == pytest.approx(tail, rel=0.01, abs=1e-6)
            label = int(text.tokens[t + 1])
            wanted = kept[label] if label in kept else tail / (peers.VOCABULARY - len(kept))
            assert math.exp(row.targets.label_logprob[n]) == pytest.approx(wanted, rel=0.02, abs=1e-6)
    assert verify(tmp_path / "out", deep=True, progress=False) == []


def test_the_bits_of_a_bounded_number_of_entries_are_unpacked_at_once(
    tmp_path: Path, wide_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4,096 positions at K = 4,096 they took 2.6 GB."""
    capture(tmp_path / "capture", peers.ARCEE_50)
    whole = run(tmp_path / "capture", tmp_path / "whole", wide_tokenizer).dataset_id
    entries: list[int] = []

    def unpack(packed: np.ndarray, *, bits: int, count: int) -> np.ndarray:
        entries.append(len(packed) * count)
        return unpack_stream(packed, bits=bits, count=count)

    monkeypatch.setattr(distillkit_rows, "unpack_stream", unpack)
    monkeypatch.setattr(distillkit_rows, "ENTRIES_PER_BLOCK", 200)
    assert run(tmp_path / "capture", tmp_path / "parts", wide_tokenizer).dataset_id == whole
    assert max(entries) == 200


def test_the_last_of_t_distributions_is_left_out(tmp_path: Path, wide_tokenizer: Path) -> None:
    capture(tmp_path / "a", peers.ALL_EXACT)
    capture(tmp_path / "b", peers.ALL_EXACT, last=True)
    shorter, longer = (run(tmp_path / name, tmp_path / f"out {name}", wide_tokenizer) for name in "ab")
    for one, other in zip(shorter.rows(), longer.rows(), strict=True):
        np.testing.assert_array_equal(one.targets.ids, other.targets.ids)


def test_a_packed_row_becomes_one_row_per_document(tmp_path: Path, wide_tokenizer: Path) -> None:
    texts = peers.sequences(3)
    single = [peers.distillkit_row(one, peers.ALL_EXACT, last=True) for one in texts]
    packed = {name: [value for row in single for value in row[name]] for name in single[0]}
    packed["attention_mask"] = [1] * 24 + [2] * 24 + [0] * 4 + [3] * 20
    packed["labels"] = [-100] * 5 + packed["input_ids"][5:]
    alone = {**single[0], "attention_mask": [1] * 24, "labels": single[0]["input_ids"]}
    peers.write_distillkit(tmp_path / "capture", [alone, packed, alone], peers.ALL_EXACT, per_file=3)
    dataset = run(tmp_path / "capture", tmp_path / "out", wide_tokenizer, rows_per_unit=2)
    rows = list(dataset.rows())
    assert [row.sample_id for row in rows] == ["data_0-0", "data_0-1-0", "data_0-1-1", "data_0-1-2", "data_0-2"]
    assert [row.token_ids.size for row in rows] == [24, 24, 24, 20, 24]
    assert rows[1].target_spans.tolist() == [[4, 23]]
    assert rows[3].token_ids.tolist() == texts[2].tokens[4:].tolist()
    assert set(rows[3].targets.ids[0].tolist()) == set(peers.top(texts[2].logprobs[4], 8)[0])
    assert len(dataset.shards) == 3


def test_an_appended_pad_token_is_cut_off(tmp_path: Path, wide_tokenizer: Path) -> None:
    text = peers.sequences(1)[0]
    text.tokens[-1] = 1
    peers.write_distillkit(tmp_path / "in", [peers.distillkit_row(text, peers.ALL_EXACT)], peers.ALL_EXACT, per_file=1)
    row = run(tmp_path / "in", tmp_path / "out", wide_tokenizer, pad_id=1).read_shard(0)[0]
    assert row.token_ids.tolist() == text.tokens[:-1].tolist()
    assert row.positions.tolist() == list(range(22))


def test_values_that_were_not_compressed_need_no_settings(tmp_path: Path, wide_tokenizer: Path) -> None:
    text = peers.sequences(1)[0]
    entries = [peers.top(one, 8) for one in text.logprobs[:-1]]
    row = {
        "input_ids": [text.tokens.tolist()],
        "token_ids": [[ids for ids, _ in entries]],
        "top_values": [[values for _, values in entries]],
    }
    pq.write_table(pa.table(row), tmp_path / "data.parquet")
    found = run(tmp_path / "data.parquet", tmp_path / "out", wide_tokenizer).read_shard(0)[0]
    np.testing.assert_allclose(
        found.targets.by_probability().logprobs, [values for _, values in entries], rtol=2e-3, atol=1e-3
    )


def test_ids_of_uninitialized_memory_beside_minus_infinity_are_left_out(tmp_path: Path, wide_tokenizer: Path) -> None:
    # vLLM may return fewer entries than asked; the capture then packs whatever its empty array held, at -inf.
    text = peers.sequences(1)[0]
    row = peers.distillkit_row(text, peers.ALL_EXACT)
    ids, values = peers.top(text.logprobs[3], 8)
    broken = [*values[:6], -math.inf, -math.inf]
    row["compressed_logprobs"][3] = list(b"".join(peers.float_bytes(value, "float32") for value in broken))
    row["bytepacked_indices"][3] = list(peers.bit_stream([*ids[:6], 255, ids[0]], 8))
    peers.write_distillkit(tmp_path / "in", [row], peers.ALL_EXACT, per_file=1)
    targets = run(tmp_path / "in", tmp_path / "out", wide_tokenizer).read_shard(0)[0].targets
    assert targets.counts[2:5].tolist() == [8, 6, 8]
    assert set(targets.ids[3].tolist()) == set(ids[:6])


def broken_rows() -> dict[str, tuple[dict[str, Any], str]]:
    """Rows with one fault each, and words of the error."""
    text = peers.sequences(1)[0]
    good = peers.distillkit_row(text, peers.ARCEE_50)

    def change(name: str, value: Any) -> dict[str, Any]:
        return {**good, name: value}

    nan = [*good["compressed_logprobs"][:-1], [0xC0, 0x7F] * 7]
    zeros = [*good["bytepacked_indices"][:-1], [0] * 50]
    return {
        "fewer distributions": ({**good, "input_ids": [*good["input_ids"], 3]}, "23 positions for 25 tokens"),
        "short values": (change("compressed_logprobs", [[0] * 13] * 23), "13 values at a position"),
        "short ids": (change("bytepacked_indices", [[0] * 49] * 23), "49 values at a position"),
        "NaN": (change("compressed_logprobs", nan), "NaN"),
        "zeros": (change("bytepacked_indices", zeros), "twice"),
        "foreign token": (change("input_ids", [*good["input_ids"][:-1], 200]), "0..199"),
        "one token": ({name: value[:1] for name, value in good.items()}, "none of 1 tokens is a target"),
    }


@pytest.mark.parametrize("fault", broken_rows())
def test_a_row_with_a_fault_ends_the_import_or_is_rejected(fault: str, tmp_path: Path, wide_tokenizer: Path) -> None:
    row, words = broken_rows()[fault]
    texts = peers.sequences(2, seed=1)
    rows = [peers.distillkit_row(texts[0], peers.ARCEE_50), row, peers.distillkit_row(texts[1], peers.ARCEE_50)]
    peers.write_distillkit(tmp_path / "in", rows, peers.ARCEE_50, per_file=2)
    with pytest.raises(UnusableRow, match=words) as caught:
        run(tmp_path / "in", tmp_path / "out", wide_tokenizer)
    assert "data_0-1" in str(caught.value)
    dataset = run(tmp_path / "in", tmp_path / "out", wide_tokenizer, bad_rows="reject")
    assert [row.sample_id for row in dataset.rows()] == ["data_0-0", "data_1-0"]
    assert dataset.manifest.rejected == 1


@pytest.mark.parametrize("config", [peers.LEGACY, peers.ARCEE_50, {**peers.ARCEE_50, "exact_k": 0}])
def test_centered_logits_are_refused(config: dict[str, Any], tmp_path: Path, wide_tokenizer: Path) -> None:
    text = peers.sequences(1)[0]
    logits = peers.Sequence(text.tokens, text.logprobs - text.logprobs.mean(axis=1, keepdims=True))
    peers.write_distillkit(tmp_path / "in", [peers.distillkit_row(logits, config)], config, per_file=1)
    with pytest.raises(NotFullSoftmax, match="normalizer"):
        run(tmp_path / "in", tmp_path / "out", wide_tokenizer)


def test_distributions_of_a_neighboring_token_are_refused(tmp_path: Path, wide_tokenizer: Path) -> None:
    shifted = [peers.Sequence(one.tokens, np.roll(one.logprobs, 1, axis=0)) for one in peers.sequences(20)]
    rows = [peers.distillkit_row(one, peers.ALL_EXACT) for one in shifted]
    peers.write_distillkit(tmp_path / "in", rows, peers.ALL_EXACT, per_file=20)
    with pytest.raises(AlignmentDoubtful, match="the token itself"):
        run(tmp_path / "in", tmp_path / "out", wide_tokenizer, assume_aligned=False, normalized_over=None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("d: 200", "k"),
        ("d: 200\nk: 8\nexact_k: 9\nresidual_bins: []", "exact_k"),
        ("d: 200\nk: 8\nexact_k: 4\nresidual_bins: []", "polynomial_terms"),
        ("d: 200\nk: 8\nexact_k: 8\nnew_trick: 1", "new_trick"),
        ("d: 99999999\nk: 8\nexact_k: 8", "d"),
        ("- 1", "mapping"),
        ("{", "YAML"),
        ("a: &a [1, 2]\nb: [*a, *a]", "alias"),
        ("!!python/object/apply:os.system [true]", "YAML"),
        ("vocab_size: 200\nk: 8\nexact_k: 8\npolynomial_degree: 2", "old compressor"),
    ],
)
def test_settings_that_cannot_be_used_are_named(text: str, words: str, tmp_path: Path, wide_tokenizer: Path) -> None:
    capture(tmp_path / "in", peers.ALL_EXACT)
    (tmp_path / "in" / "compression_config.yaml").write_text(text)
    with pytest.raises(CompressionUnknown, match=words):
        run(tmp_path / "in", tmp_path / "out", wide_tokenizer)


def test_absent_settings_are_named_and_those_of_a_training_run_will_do(tmp_path: Path, wide_tokenizer: Path) -> None:
    capture(tmp_path / "in", peers.LEGACY)
    (tmp_path / "in" / "compression_config.yaml").rename(tmp_path / "other.yaml")
    with pytest.raises(CompressionUnknown, match="mean nothing without"):
        run(tmp_path / "in", tmp_path / "out", wide_tokenizer)
    text = peers.yaml.safe_dump({"teacher": {"kind": "dataset", "legacy_logit_compression": peers.LEGACY}})
    (tmp_path / "run.yaml").write_text(text)
    assert len(run(tmp_path / "in", tmp_path / "out", wide_tokenizer, config=str(tmp_path / "run.yaml"))) == 3


def test_files_that_are_no_capture_are_named(tmp_path: Path, wide_tokenizer: Path) -> None:
    with pytest.raises(SourceUnreadable, match="no such"):
        run(tmp_path / "nowhere", tmp_path / "out", wide_tokenizer)
    (tmp_path / "in").mkdir()
    with pytest.raises(SourceUnreadable, match="no file"):
        run(tmp_path / "in", tmp_path / "out", wide_tokenizer)
    (tmp_path / "in" / "data_0.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SourceUnreadable, match="whole Parquet"):
        run(tmp_path / "in", tmp_path / "out", wide_tokenizer)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in" / "data_0.parquet")
    with pytest.raises(SourceUnreadable, match="input_ids"):
        run(tmp_path / "in", tmp_path / "out", wide_tokenizer)
    capture(tmp_path / "empty", peers.ALL_EXACT, 1)
    table = pq.read_table(tmp_path / "empty" / "data_0.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "empty" / "data_0.parquet")
    with pytest.raises(SourceUnreadable, match="no row"):
        run(tmp_path / "empty", tmp_path / "out", wide_tokenizer)


def test_settings_that_no_header_holds_are_named(tmp_path: Path, wide_tokenizer: Path) -> None:
    capture(tmp_path / "in", peers.ALL_EXACT)
    with pytest.raises(InvalidHeader, match="rows_per_unit"):
        run(tmp_path / "in", tmp_path / "out", wide_tokenizer, rows_per_unit=0)


def test_other_settings_for_the_same_bytes_are_another_source(tmp_path: Path, wide_tokenizer: Path) -> None:
    capture(tmp_path / "in", peers.ALL_EXACT)
    run(tmp_path / "in", tmp_path / "out", wide_tokenizer)
    config = {**peers.ALL_EXACT, "delta_encoding": True}
    (tmp_path / "in" / "compression_config.yaml").write_text(peers.yaml.safe_dump(config))
    with pytest.raises(HeaderMismatch, match="source_sha256"):
        run(tmp_path / "in", tmp_path / "out", wide_tokenizer)


def test_logit_columns_beyond_the_tokenizer_are_in_the_header(tmp_path: Path, wide_tokenizer: Path) -> None:
    config = {**peers.ALL_EXACT, "d": 256}
    capture(tmp_path / "in", config)
    header = run(tmp_path / "in", tmp_path / "out", wide_tokenizer).header
    assert (header.vocab_size, header.token_count) == (256, peers.VOCABULARY)


def test_the_names_of_the_layouts_stay() -> None:
    """They are hashed into `source_sha256`: an import that another release started could not resume."""
    assert list(LAYOUTS) == ["quantised", "legacy", "plain"]
