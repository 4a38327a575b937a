"""axolotl's KD layout, import and export: the alignment, what is rejected, and that a round trip loses nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import InvalidRow
from coldstill.tools.errors import (
    AlignmentDoubtful,
    NotExportable,
    NotFullSoftmax,
    OutputNotEmpty,
    SourceUnreadable,
    UnusableRow,
)
from coldstill.tools.exchange.axolotl_import import import_axolotl
from coldstill.tools.exchange.export import export_axolotl
from coldstill.tools.exchange.settings import AxolotlSettings
from coldstill.tools.verify import verify
from tests import making
from tests.tools.exchange import peers

K = 6


def run(source: Path, output: Path, tokenizer: Path, **changes: Any) -> Dataset:
    """The import, quietly, and its dataset."""
    fields = {"tokenizer": tokenizer, "teacher": "peer/teacher", "fidelity": "exact", "assume_aligned": True, **changes}
    import_axolotl(source, output, AxolotlSettings.model_validate(fields), progress=False)
    return open_dataset(output)


def assert_holds(dataset: Dataset, texts: list[peers.Sequence], *, first_target: int) -> None:
    """Target t of each row is the teacher's distribution of token t + 1."""
    assert len(dataset) == len(texts)
    for text, row in zip(texts, dataset.rows(), strict=True):
        assert row.token_ids.tolist() == text.tokens.tolist()
        assert row.positions.tolist() == list(range(first_target, text.tokens.size - 1))
        for n, t in enumerate(row.positions):
            ids, values = peers.top(text.logprobs[t], K)
            found = dict(zip(row.targets.ids[n].tolist(), row.targets.logprobs[n].tolist(), strict=True))
            assert set(found) == set(ids)
            np.testing.assert_allclose([found[token] for token in ids], values, rtol=2e-3, atol=1e-3)
            assert math.exp(row.targets.log_tail[n]) == pytest.approx(1 - sum(map(math.exp, values)), abs=2e-3)
    assert verify(dataset.store.root, deep=True, progress=False) == []


@pytest.mark.parametrize("predicts", ["next", "same"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_position_t_of_the_import_predicts_token_t_plus_1(
    predicts: str, ending: str, tmp_path: Path, wide_tokenizer: Path
) -> None:
    texts = peers.sequences(4)
    rows = [peers.prepared_row(one, K, predicts=predicts, targets_from=5) for one in texts]
    if ending == "jsonl":
        path = peers.write_jsonl(tmp_path / "in.jsonl", rows)
    else:
        path = tmp_path / "in.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    dataset = run(path, tmp_path / "out", wide_tokenizer, predicts=predicts, rows_per_unit=3)
    assert dataset.header.top_k == K
    assert_holds(dataset, texts, first_target=4)


@pytest.mark.parametrize("version", [1, 2])
def test_raw_lists_belong_to_the_last_tokens(version: int, tmp_path: Path, wide_tokenizer: Path) -> None:
    texts = peers.sequences(3)
    path = peers.write_jsonl(
        tmp_path / "in.jsonl", [peers.raw_row(one, K, version=version, answer=10) for one in texts]
    )
    assert_holds(run(path, tmp_path / "out", wide_tokenizer), texts, first_target=13)


def test_empty_lists_of_the_first_token_are_no_targets(tmp_path: Path, wide_tokenizer: Path) -> None:
    text = peers.sequences(1)[0]
    row = peers.raw_row(text, K, version=1, answer=23)
    row["logprobs"] = [None, *row["logprobs"]]
    path = peers.write_jsonl(tmp_path / "in.jsonl", [row])
    assert_holds(run(path, tmp_path / "out", wide_tokenizer), [text], first_target=0)


def test_without_labels_the_mask_selects_the_targets(tmp_path: Path, wide_tokenizer: Path) -> None:
    text = peers.sequences(1)[0]
    row = peers.prepared_row(text, K)
    del row["labels"]
    row["target_mask"][:7] = [[0] * K] * 7
    path = peers.write_jsonl(tmp_path / "in.jsonl", [row])
    assert_holds(run(path, tmp_path / "out", wide_tokenizer), [text], first_target=7)


def test_with_labels_a_mask_that_is_off_by_one_is_no_matter(tmp_path: Path, wide_tokenizer: Path) -> None:
    # transform_logprobs sets the mask of position p by the label of token p, the trainer reads row p for token p + 1.
    text = peers.sequences(1)[0]
    row = peers.prepared_row(text, K)
    row["labels"][:7] = [-100] * 7
    row["target_mask"] = [[0] * K] * 7 + [[1] * K] * 17
    path = peers.write_jsonl(tmp_path / "in.jsonl", [row])
    assert_holds(run(path, tmp_path / "out", wide_tokenizer), [text], first_target=6)


def test_padded_entries_of_a_position_are_left_out(tmp_path: Path, wide_tokenizer: Path) -> None:
    text = peers.sequences(1)[0]
    row = peers.prepared_row(text, K)
    row["target_logprobs"][3][4:], row["target_token_ids"][3][4:] = [-1e9, -1e9], [0, 0]
    row["target_logprobs"][4][4:], row["target_token_ids"][4][4:] = [0.0, 0.0], [0, 0]
    row["target_mask"][4][4:] = [0, 0]
    targets = run(peers.write_jsonl(tmp_path / "in.jsonl", [row]), tmp_path / "out", wide_tokenizer).read_shard(0)[0]
    assert targets.targets.counts[2:6].tolist() == [K, 4, 4, K]


def test_the_entry_that_vllm_adds_for_the_real_token_is_its_logprob(tmp_path: Path, wide_tokenizer: Path) -> None:
    text = peers.sequences(1)[0]
    row = peers.raw_row(text, K, version=2, answer=23)
    outside = [t for t in range(23) if text.tokens[t + 1] not in row["target_token_ids"][t]]
    assert outside
    for t in outside:
        row["target_token_ids"][t].append(int(text.tokens[t + 1]))
        row["logprobs"][t].append(float(text.logprobs[t, text.tokens[t + 1]]))
    path = peers.write_jsonl(tmp_path / "in.jsonl", [row])
    found = run(path, tmp_path / "out", wide_tokenizer, top_k=K).read_shard(0)[0].targets
    assert found.counts.tolist() == [K] * 23
    wanted = text.logprobs[np.arange(23), text.tokens[1:]]
    np.testing.assert_allclose(found.label_logprob, wanted, rtol=2e-3, atol=1e-3)


def broken_rows() -> dict[str, tuple[Any, str]]:
    """Rows with one fault each, and words of the error."""
    text = peers.sequences(1)[0]
    prepared = peers.prepared_row(text, K)
    raw = peers.raw_row(text, K, version=1, answer=10)

    def at_position_3(name: str, value: Any) -> dict[str, Any]:
        lists = list(prepared[name])
        lists[3] = value
        return {**prepared, name: lists}

    return {
        "more lists than tokens": ({**raw, "logprobs": raw["logprobs"] * 3}, "30 lists"),
        "text for ids": ({**raw, "logprobs": [[{"token": "the", "logprob": -1.0}]]}, "token_id:N"),
        "fewer lists": ({**prepared, "target_logprobs": prepared["target_logprobs"][:-3]}, "as many entries"),
        "lists cut": ({name: value[:-3] if name[0] == "t" else value for name, value in prepared.items()}, "21 lists"),
        "other widths": (at_position_3("target_token_ids", [1, 2]), "as many entries"),
        "NaN": (at_position_3("target_logprobs", [math.nan] * K), "NaN"),
        "null": (at_position_3("target_logprobs", [None] * K), "nulls"),
        "zeros": ({**at_position_3("target_logprobs", [0.0] * K), "target_token_ids": [[0] * K] * 24}, "twice"),
        "no mass": (at_position_3("target_logprobs", [-math.inf] * K), "no distribution"),
        "labels cut": ({**prepared, "labels": prepared["labels"][:-1]}, "23 values"),
        "nothing learned": ({**prepared, "labels": [-100] * 24}, "no target token"),
        "foreign token": ({**prepared, "input_ids": [999] * 24}, "999"),
        "metadata": ({**prepared, "metadata": "[1]"}, "JSON object"),
        "no lists": ({**prepared, "target_logprobs": None}, "nothing"),
        "wrong types": ({**prepared, "input_ids": "text"}, "columns of the layout"),
        "huge id": (at_position_3("target_token_ids", [1 << 70] * K), "columns of the layout"),
        "no object": ([1, 2], "one JSON object"),
    }


@pytest.mark.parametrize("fault", broken_rows())
def test_a_row_with_a_fault_ends_the_import_or_is_rejected(fault: str, tmp_path: Path, wide_tokenizer: Path) -> None:
    row, words = broken_rows()[fault]
    good = [peers.prepared_row(one, K) for one in peers.sequences(2, seed=1)]
    if fault in ("more lists than tokens", "text for ids"):
        good = [peers.raw_row(one, K, version=1, answer=10) for one in peers.sequences(2, seed=1)]
    path = peers.write_jsonl(tmp_path / "in.jsonl", [good[0], row, good[1]])
    with pytest.raises(UnusableRow, match=words) as caught:
        run(path, tmp_path / "out", wide_tokenizer)
    assert "row 1" in str(caught.value)
    dataset = run(path, tmp_path / "out", wide_tokenizer, bad_rows="reject")
    assert [row.sample_id for row in dataset.rows()] == ["in-0", "in-2"]
    assert dataset.manifest.rejected == 1


def not_utf_8(values: list[bytes]) -> pa.Array:
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("sample_id", not_utf_8([b"a", b"\xff", b"c"])),
        ("sample_id", pa.array([0, 1 << 62, 0], pa.timestamp("us"))),
        ("metadata", not_utf_8([b"{}", b'{"a": "\xff"}', b"{}"])),
        ("metadata", pa.array(["{}", '{"a": "\\ud800"}', "{}"])),
        ("metadata", pa.array(["{}", f'{{"a": "{"x" * (1 << 20)}"}}', "{}"])),
        ("input_ids", pa.array([[1, 2, 3], [1, 2.5, 3], [1, 2, 3]], pa.list_(pa.float64()))),
        ("input_ids", pa.array([[1, 2, 3], [1, math.nan, 3], [1, 2, 3]], pa.list_(pa.float64()))),
    ],
    ids=["id", "time", "metadata", "surrogate", "a megabyte", "fraction", "nan"],
)
def test_a_value_that_no_row_can_hold_ends_the_import_by_name_or_rejects_its_row(
    column: str, values: pa.Array, tmp_path: Path, wide_tokenizer: Path
) -> None:
    table = {
        "input_ids": pa.array([[1, 2, 3]] * 3),
        "target_token_ids": pa.array([[[1, 2]] * 3] * 3),
        "target_logprobs": pa.array([[[-0.5, -1.5]] * 3] * 3),
        column: values,
    }
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    with pytest.raises((UnusableRow, InvalidRow)):
        run(tmp_path / "in.parquet", tmp_path / "failed", wide_tokenizer)
    dataset = run(tmp_path / "in.parquet", tmp_path / "out", wide_tokenizer, bad_rows="reject")
    assert (len(dataset), dataset.manifest.rejected) == (2, 1)


def test_a_line_of_many_brackets_is_no_crash(tmp_path: Path, wide_tokenizer: Path) -> None:
    path = peers.write_jsonl(tmp_path / "in.jsonl", [peers.prepared_row(peers.sequences(1)[0], K)])
    path.write_text(path.read_text() + "[" * 100_000 + "\n")
    assert run(path, tmp_path / "out", wide_tokenizer, bad_rows="reject").manifest.rejected == 1


def test_messages_without_their_tokens_are_refused(tmp_path: Path, wide_tokenizer: Path) -> None:
    row = {**peers.raw_row(peers.sequences(1)[0], K, version=1, answer=10), "messages": []}
    del row["input_ids"]
    with pytest.raises(SourceUnreadable, match="token ids that were scored"):
        run(peers.write_jsonl(tmp_path / "in.jsonl", [row]), tmp_path / "out", wide_tokenizer)


def test_values_scaled_to_a_sum_of_1_are_refused(tmp_path: Path, wide_tokenizer: Path) -> None:
    rows = [peers.prepared_row(one, K) for one in peers.sequences(2)]
    for row in rows:
        for values in row["target_logprobs"]:
            total = math.log(sum(map(math.exp, values)) or 1)
            values[:] = [value - total for value in values]
    with pytest.raises(NotFullSoftmax, match="before axolotl's preprocessing"):
        run(peers.write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", wide_tokenizer)


def test_another_temperature_than_1_is_refused(tmp_path: Path, wide_tokenizer: Path) -> None:
    with pytest.raises(NotFullSoftmax, match="temperature"):
        run(tmp_path / "in.jsonl", tmp_path / "out", wide_tokenizer, temperature=2.0)


@pytest.mark.parametrize(("made", "said"), [("next", "same"), ("same", "next")])
def test_rows_taken_for_their_neighbors_are_refused(made: str, said: str, tmp_path: Path, wide_tokenizer: Path) -> None:
    rows = [peers.prepared_row(one, K, predicts=made) for one in peers.sequences(20)]
    for row in rows:
        del row["labels"]
    path = peers.write_jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(AlignmentDoubtful, match=f"predicts='{made}'"):
        run(path, tmp_path / "out", wide_tokenizer, predicts=said, assume_aligned=False)
    assert len(run(path, tmp_path / "out", wide_tokenizer, predicts=made, assume_aligned=False)) == 20


def test_an_axolotl_export_imports_to_the_same_targets(
    tiny_dataset: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    names = export_axolotl(tiny_dataset, tmp_path / "export", progress=False)
    assert names == ["000000-000.parquet", "000001-000.parquet", "000002-000.parquet"]
    original = open_dataset(tiny_dataset)
    dataset = run(tmp_path / "export", tmp_path / "out", tokenizer_folder)
    assert len(dataset) == len(original)
    for one, other in zip(original.rows(), dataset.rows(), strict=True):
        assert (one.sample_id, one.metadata) == (other.sample_id, other.metadata)
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.target_spans, other.target_spans)
        a, b = one.targets.by_probability(), other.targets.by_probability()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=3e-3)
        np.testing.assert_allclose(np.exp(a.log_tail), np.exp(b.log_tail), atol=2e-3)
        for n in range(a.positions):
            assert set(a.ids[n].tolist()) == set(b.ids[n].tolist())


def test_an_export_has_the_columns_and_the_alignment_of_axolotls_loss(tiny_dataset: Path, tmp_path: Path) -> None:
    export_axolotl(tiny_dataset, tmp_path / "export", progress=False)
    table = pq.read_table(tmp_path / "export" / "000001-000.parquet")
    rows = open_dataset(tiny_dataset).read_shard(1)
    for row, found in zip(rows, table.to_pylist(), strict=True):
        learned = set((row.positions + 1).tolist())
        tokens = row.token_ids.tolist()
        assert found["labels"] == [token if j in learned else -100 for j, token in enumerate(tokens)]
        assert found["attention_mask"] == [1] * len(tokens)
        targets = row.targets.by_probability()
        for p in range(len(tokens)):
            assert len(found["target_token_ids"][p]) == len(found["target_logprobs"][p]) == targets.top_k
            assert found["target_mask"][p] == [int(p + 1 in learned)] * targets.top_k
        for n, t in enumerate(row.positions):
            assert found["target_token_ids"][t] == targets.ids[n].tolist()
            np.testing.assert_allclose(found["target_logprobs"][t], targets.logprobs[n])
        assert json.loads(found["metadata"]) == row.metadata


def test_a_row_with_images_is_not_exported(tmp_path: Path, tokenizer_folder: Path) -> None:
    from dataclasses import replace
    from hashlib import sha256

    from coldstill.storage_schema.rows import MediaReference

    image = MediaReference(position=0, type="image/png", sha256=sha256(b"x").hexdigest(), data=b"x")
    row = replace(making.random_row(np.random.default_rng(0), "a"), media=(image,))
    header = making.tiny_header(tokenizer_folder)
    making.write_dataset(tmp_path / "in", [[row]], header=header, tokenizer=tokenizer_folder)
    with pytest.raises(NotExportable, match="images"):
        export_axolotl(tmp_path / "in", tmp_path / "out", progress=False)


def test_an_export_never_mixes_with_what_is_there(tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(OutputNotEmpty):
        export_axolotl(tiny_dataset, tmp_path, progress=False)
