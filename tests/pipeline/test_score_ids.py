"""Laws of `source.score_ids`: what a column may hold, what is kept, and what a dataset of it says and decodes to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from coldstill.common.errors import ColdstillError
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.score_ids import BadScoreIds, ids_of_part, read_score_ids
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.sources.source import open_source
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.pipeline.teachers.target_extractor import draw_uniforms, summarize
from coldstill.pipeline.worker import CaptureWorker
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import HeaderMismatch
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.rows import LOG_FLOOR
from coldstill.tools.derive.merge import merge
from coldstill.tools.verify import verify
from tests import making
from tests.pipeline.capturing import capture_config, do_units

NAMED = [3, 250, 40, 3]  # one of them twice


def _config(folder: Path, ids: object, *, output: str = "dataset", rows: int = 12, **changes: object) -> CaptureConfig:
    capture_config(folder, rows=rows)
    path = folder / f"{output}.jsonl"
    making.write_jsonl(path, [{**row, "ids": ids} for row in making.chat_rows(rows)])  # type: ignore[dict-item]
    source = {"path": str(path), "score_ids": "ids", "max_score_ids": 5}
    return capture_config(folder, output=output, **{"source": source, **changes})


def _sealed(config: CaptureConfig) -> DatasetHeader:
    prepared = prepare(config)
    do_units(config)
    seal(prepared.store)
    return prepared.header


def _sequences(config: CaptureConfig) -> list[TokenSequence | Reject]:
    return list(SequenceMaker.of(config).sequences(open_source(config.source).rows()))


@pytest.mark.parametrize("min_prob", [0.0, 0.05])
@pytest.mark.parametrize(("vocabulary", "top_k"), [(12, 4), (12, 12), (300, 4), (5000, 4)])
def test_the_named_ids_join_the_top_k_and_leave_the_tail_and_the_draws(
    vocabulary: int, top_k: int, min_prob: float
) -> None:
    random = np.random.default_rng(vocabulary)
    logits = torch.from_numpy(3 * random.standard_normal((7, vocabulary))).float()
    named = np.stack([random.choice(vocabulary, 6, replace=False) for _ in range(7)])
    named[1], named[2, 3:], named[3, 0] = -1, -1, int(logits[3].argmax())
    targets = summarize(
        logits,
        torch.arange(7),
        np.random.default_rng(1).random((7, 400)),
        top_k=top_k,
        min_prob=min_prob,
        kept_draws=400,
        token_count=vocabulary,
        named=named,
        named_width=min(6, vocabulary - top_k),
    )
    targets.check(token_count=vocabulary)
    starts = targets.draw_offsets
    for n in range(7):
        z = logits[n].double().numpy()
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        best = sorted(range(vocabulary), key=lambda v: (-p[v], v))[:top_k]
        wanted = {v for rank, v in enumerate(best) if rank == 0 or p[v] >= min_prob} | {*named[n].tolist()} - {-1}
        kept = targets.ids[n, : targets.counts[n]].tolist()
        assert set(kept) == wanted
        np.testing.assert_allclose(targets.logprobs[n, : len(kept)], np.log(p[kept]), atol=2e-6)
        tail = math.fsum(p[v] for v in range(vocabulary) if v not in wanted)
        np.testing.assert_allclose(targets.log_tail[n], math.log(tail) if tail else LOG_FLOOR, atol=2e-6)
        drawn = targets.draw_ids[starts[n] : starts[n + 1]]
        assert not set(drawn.tolist()) & wanted
        assert abs(drawn.size / 400 - tail) < 0.1


def test_an_id_without_any_mass_is_kept_with_the_least_log_prob() -> None:
    logits = torch.zeros(1, 100)
    logits[0, 7] = -torch.inf
    found = summarize(
        logits,
        torch.tensor([0]),
        draw_uniforms(np.arange(1), draws=9, seed=0, sample_id="a"),
        top_k=2,
        min_prob=0,
        kept_draws=9,
        token_count=100,
        named=np.array([[7]]),
        named_width=1,
    )
    found.check(token_count=100)
    assert found.counts[0] == 3
    assert found.logprobs[0, found.ids[0].tolist().index(7)] == LOG_FLOOR


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("1, 2", "str, not a list"),
        (None, "NoneType"),
        (["3"], "not an integer"),
        ([1.5], "not an integer"),
        ([True], "not an integer"),
        ([64], "not one of 0..63"),
        ([-1], "not one of 0..63"),
        ([[1], [2]], "2 lists of ids for 3 target tokens"),
        ([[1], 2, [3]], "together"),
        ([1, 2, 3, 4], "at most source.max_score_ids, 3"),
        ([[1], [1, 2, 3, 4], [2]], "4 ids at one target"),
    ],
)
def test_a_column_of_anything_but_ids_is_refused(value: object, why: str) -> None:
    with pytest.raises(BadScoreIds, match=why):
        read_score_ids(value, targets=3, token_count=64, most=3, width=8)


def test_more_entries_than_a_row_may_store_are_refused() -> None:
    with pytest.raises(BadScoreIds, match="16,777,216 in a row"):
        read_score_ids([1], targets=1 << 13, token_count=64, most=3, width=1 << 12)


def test_lists_are_padded_and_repeats_count_once() -> None:
    assert read_score_ids([5, 5, 1], targets=9, token_count=64, most=3, width=8).tolist() == [[5, 1]]
    found = read_score_ids([[5], [], [1, 2, 1]], targets=3, token_count=64, most=3, width=8)
    assert found.tolist() == [[5, -1], [-1, -1], [1, 2]]


def test_each_part_of_a_row_has_the_ids_of_its_own_targets() -> None:
    """Of a part, the first token is no target."""
    random = np.random.default_rng(0)
    for _ in range(50):
        mask = random.random(23) < 0.6
        ids = np.arange(mask[1:].sum())[:, None]
        number = {int(token): index for index, token in enumerate(1 + np.flatnonzero(mask[1:]))}
        for start in range(0, 23, 6):
            part = ids_of_part(ids, mask.tolist(), start, start + 6)
            wanted = [number[j] for j in range(start + 1, min(start + 6, 23)) if mask[j]]
            assert part is not None
            assert part[:, 0].tolist() == wanted


def test_split_rows_carry_one_list_for_each_target(tmp_path: Path) -> None:
    config = _config(tmp_path, NAMED, rows=1)
    whole = _sequences(config)[0]
    assert isinstance(whole, TokenSequence)
    targets = int((whole.target_spans[:, 1] - whole.target_spans[:, 0]).sum())
    changes = {"source": {"over_long": "split"}, "teacher": {"max_length": 5}}
    split = _config(tmp_path, [[n] for n in range(targets)], rows=1, output="split")
    split = split.model_copy(
        update={
            "source": split.source.model_copy(update=changes["source"]),
            "teacher": split.teacher.model_copy(update=changes["teacher"]),
        }
    )
    parts = [part for part in _sequences(split) if isinstance(part, TokenSequence)]
    assert len(parts) > 1
    for part in parts:
        assert part.score_ids is not None
        assert len(part.score_ids) == int((part.target_spans[:, 1] - part.target_spans[:, 0]).sum())


def test_rows_without_the_column_are_rejected_by_name(tmp_path: Path) -> None:
    config = _config(tmp_path, NAMED)
    making.write_jsonl(Path(config.source.path or ""), [*making.chat_rows(2)])
    assert {result.reason for result in _sequences(config) if isinstance(result, Reject)} == {"bad_score_ids"}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> tuple[CaptureConfig, DatasetHeader]:
    config = _config(tmp_path_factory.mktemp("named"), NAMED)
    return config, _sealed(config)


def test_a_dataset_keeps_them_beside_the_top_k_and_decodes(named: tuple[CaptureConfig, DatasetHeader]) -> None:
    config, header = named
    assert (header.kept_ids, header.top_k) == ("top_k_and_named", 17)
    stated = json.loads(header.to_bytes())["about"]["score_ids"]
    assert stated == {"column": "ids", "top_k": 12, "most": 5}
    assert verify(config.output, deep=True) == []
    rows = list(open_dataset(config.output).rows())
    assert len(rows) == 12
    for row in rows:
        assert "ids" not in row.metadata
        assert all(row.targets.among_kept(np.full(row.targets.positions, id_)).all() for id_ in NAMED)
        assert row.targets.counts.max() <= 15


@pytest.mark.parametrize(("fidelity", "tolerance"), [("fine", 0.04), ("exact", 0.004)])
def test_log_probs_at_named_ids_are_the_teachers_own(tmp_path: Path, fidelity: str, tolerance: float) -> None:
    """Against a float64 log-softmax of the model, after encoding and decoding."""
    from transformers import AutoModelForCausalLM

    config = _config(tmp_path, NAMED, rows=4, fidelity=fidelity)
    header = _sealed(config)
    model = AutoModelForCausalLM.from_pretrained(config.teacher.model, dtype=torch.float32)
    for row in open_dataset(config.output).rows():
        logits = model(torch.from_numpy(row.token_ids.astype(np.int64))[None]).logits[0, :, : header.token_count]
        wanted = torch.log_softmax(logits.double(), -1).detach().numpy()[row.positions]
        for id_ in NAMED:
            at = row.targets.ids == id_
            found = np.where(at, row.targets.logprobs, -np.inf).max(1)
            np.testing.assert_allclose(found, wanted[:, id_], atol=tolerance)
        kept = np.where(row.targets.kept, np.exp(row.targets.logprobs), 0).sum(1)
        np.testing.assert_allclose(kept + np.exp(row.targets.log_tail), 1, atol=1e-5)


def test_without_the_column_no_byte_changes(tmp_path: Path) -> None:
    """The same rows, once with a column that nobody names."""
    plain = _config(tmp_path, NAMED, output="plain")
    plain = plain.model_copy(update={"source": plain.source.model_copy(update={"score_ids": None})})
    header = _sealed(plain)
    fields = json.loads(header.to_bytes())
    assert (header.kept_ids, header.top_k) == ("top_k", 12)
    assert "score_ids" not in fields["about"]
    empty = _config(tmp_path, [], output="empty")  # the column names nothing: the same ids, under another header
    _sealed(empty)
    for one, other in zip(open_dataset(plain.output).rows(), open_dataset(empty.output).rows(), strict=True):
        np.testing.assert_array_equal(np.sort(one.targets.ids, 1), np.sort(other.targets.ids[:, :12], 1))
        np.testing.assert_array_equal(one.targets.draw_ids, other.targets.draw_ids)


def test_another_column_is_another_dataset(named: tuple[CaptureConfig, DatasetHeader]) -> None:
    config, _ = named
    for changes in ({"score_ids": None}, {"max_score_ids": 6}):
        source = config.source.model_copy(update=changes)
        with pytest.raises(HeaderMismatch, match=r"set source\.score_ids: ids"):
            prepare(config.model_copy(update={"source": source}))


def test_a_merge_with_an_ordinary_capture_is_refused(
    named: tuple[CaptureConfig, DatasetHeader], tmp_path: Path
) -> None:
    config, _ = named
    source = config.source.model_copy(update={"score_ids": None})
    teacher = config.teacher.model_copy(update={"top_k": 17})
    plain = config.model_copy(update={"source": source, "teacher": teacher, "output": str(tmp_path / "plain")})
    _sealed(plain)
    with pytest.raises(ColdstillError, match="kept_ids"):
        merge([config.output, plain.output], tmp_path / "both")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mode": "generate"}, "mode score with source.score_ids"),
        ({"mode": "pretrain"}, "mode score with source.score_ids"),
        ({"teacher": {"engine": "vllm", "tap": "public"}}, "tap public gives no scores"),
        ({"teacher": {"engine": "endpoint", "endpoint": "http://host/v1"}}, "engine endpoint gives no scores"),
        ({"teacher": {"engine": "tests.chaos.teacher:ChaosTeacher"}}, "gives no scores"),
        ({"teacher": {"top_k": 4095}}, "at most 4096"),
    ],
)
def test_settings_that_cannot_score_named_ids_are_refused(changes: dict[str, object], why: str) -> None:
    document = {
        "output": "out",
        "source": {"path": "rows.jsonl", "score_ids": "ids"},
        "teacher": {"model": "m", "draws": 0, **changes.pop("teacher", {})},  # type: ignore[dict-item]
        **changes,
    }
    with pytest.raises(ValueError, match=why):
        CaptureConfig.model_validate(document)


def test_a_small_vocabulary_bounds_what_is_kept(tmp_path: Path) -> None:
    """K and the named ids may be more than there are tokens."""
    config = _config(tmp_path, [5, 6], rows=2, teacher={"top_k": 256})
    header = _sealed(config)
    assert header.top_k == header.token_count == 258
    assert all(row.targets.counts.max() <= 258 for row in open_dataset(config.output).rows())
    assert CaptureWorker(config).header.top_k == 258
