"""`coldstill stats` equals a slow count in plain Python, and stats add up."""

from __future__ import annotations

import io
import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from coldstill.storage_schema.codec import STREAMS
from coldstill.storage_schema.commits import Reject, commit_unit
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import DatasetNotFound, ShardDamaged, ShardMissing
from coldstill.storage_schema.manifest import MANIFEST_NAME, seal
from coldstill.storage_schema.rows import CachedRow, spans_from_mask
from coldstill.tools.inspect.row_facts import row_facts
from coldstill.tools.stats.histogram import Histogram
from coldstill.tools.stats.measure import FOOTERS, SCALES, Stats, measure_stats
from coldstill.tools.stats.table import show_stats
from tests import making

PER_TARGET = ("entropy", "tail_mass", "label_logprob", "kept_ids", "draws")


def ragged_row(rng: np.random.Generator, sample_id: str) -> CachedRow:
    """A row whose positions keep 1 to 6 ids and 0 to 5 draws, and sometimes their label."""
    tokens = rng.integers(0, making.VOCABULARY, int(rng.integers(3, 60)), dtype=np.int32)
    spans = spans_from_mask(np.ones(tokens.size, bool))
    probs = making.random_probs(rng, tokens.size - 1, making.VOCABULARY, sharpness=3)
    likely = rng.random(tokens.size - 1) < 0.5
    tokens[1:][likely] = probs[likely].argmax(1)
    targets = making.targets_of(
        probs, tokens[1:], top_k=6, min_prob=0.03, draws=5, seed=int(rng.integers(1 << 30)), draw_logprobs=True
    )
    return CachedRow(sample_id=sample_id, token_ids=tokens, target_spans=spans, targets=targets)


@pytest.fixture
def ragged_dataset(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """Root of a dataset with a floor, draws and their log-probs: 4 shards of 1 to 4 rows."""
    rng = np.random.default_rng(3)
    header = making.tiny_header(tokenizer_folder, top_k=6, draws=5, min_prob=0.03, draw_logprobs=True)
    shards = [[ragged_row(rng, f"{shard}-{row}") for row in range(shard + 1)] for shard in range(4)]
    making.write_dataset(tmp_path / "ragged", shards, header=header, tokenizer=tokenizer_folder)
    return tmp_path / "ragged"


@pytest.fixture(params=["tiny_dataset", "ragged_dataset"])
def any_dataset(request: pytest.FixtureRequest) -> Path:
    root = request.getfixturevalue(request.param)
    assert isinstance(root, Path)
    return root


def slow_values(root: Path) -> dict[str, list[float]]:
    """Every value of every histogram, one target at a time; a label that is not kept has rank 0."""
    values: dict[str, list[float]] = {name: [] for name in SCALES}
    for row in open_dataset(root).rows():
        targets = row.targets
        values["row_tokens"].append(len(row.token_ids))
        values["row_media"].append(len(row.media))
        values["row_targets"].append(sum(int(stop) - int(start) for start, stop in row.target_spans))
        for n, position in enumerate(row.positions.tolist()):
            label, kept = int(row.token_ids[position + 1]), int(targets.counts[n])
            entries = [(-float(targets.logprobs[n, k]), int(targets.ids[n, k])) for k in range(kept)]
            ranked = [token_id for _, token_id in sorted(entries)]
            log_tail = float(targets.log_tail[n])
            entropy = -math.exp(log_tail) * log_tail + sum(math.exp(-minus) * minus for minus, _ in entries)
            values["entropy"].append(entropy)
            values["tail_mass"].append(math.exp(log_tail))
            values["label_rank"].append(ranked.index(label) + 1 if label in ranked else 0)
            values["label_logprob"].append(float(targets.label_logprob[n]))
            values["kept_ids"].append(kept)
            values["draws"].append(int(targets.draw_counts[n]))
    return values


def slow_bins(name: str, values: list[float]) -> dict[tuple[float, float], int]:
    edges = SCALES[name].edges.tolist()
    places = [min(max(bisect_right(edges, value) - 1, 0), len(edges) - 2) for value in values]
    return dict(Counter((edges[place], edges[place + 1]) for place in places))


def found_bins(histogram: Histogram) -> dict[tuple[float, float], int]:
    return {(item.start, item.stop): item.values for item in histogram.bins}


def test_stats_are_those_of_a_slow_count_in_plain_python(any_dataset: Path) -> None:
    slow, stats = slow_values(any_dataset), measure_stats(any_dataset, progress=False)

    ranks = slow.pop("label_rank")
    for name, values in slow.items():
        histogram = getattr(stats, name)
        assert found_bins(histogram) == slow_bins(name, values), name
        assert histogram.mean == pytest.approx(np.mean(values), rel=1e-5), name
        assert histogram.least == pytest.approx(min(values), rel=1e-5), name
        assert histogram.most == pytest.approx(max(values), rel=1e-5), name
    kept = [rank for rank in ranks if rank]
    assert found_bins(stats.label_rank) == slow_bins("label_rank", kept)
    assert stats.label_rank.outside == len(ranks) - len(kept)
    assert stats.label_kept == len(kept) / len(ranks)


def test_both_kinds_of_labels_are_in_what_is_tested(any_dataset: Path) -> None:
    stats = measure_stats(any_dataset, progress=False)

    assert stats.label_rank.outside > 10
    assert stats.label_rank.count > 10


def test_stats_agree_with_what_inspect_shows_of_each_row(any_dataset: Path) -> None:
    facts = [row_facts(row) for row in open_dataset(any_dataset).rows()]
    stats = measure_stats(any_dataset, progress=False)

    assert stats.entropy.total == pytest.approx(sum(fact.entropy.sum() for fact in facts), rel=1e-5)
    assert stats.label_rank.total == sum(int(fact.label_rank.sum()) for fact in facts)
    assert -stats.label_logprob.total == pytest.approx(sum(fact.surprise.sum() for fact in facts), rel=1e-5)


def test_totals_are_the_manifests(any_dataset: Path) -> None:
    manifest, stats = open_dataset(any_dataset).manifest, measure_stats(any_dataset, progress=False)

    for name in ("rows", "tokens", "targets", "rejected"):
        assert getattr(stats, name) == getattr(manifest, name)
    assert stats.shards == len(manifest.shards)
    assert stats.bytes == sum(shard.file.bytes for shard in manifest.shards)
    assert stats.bytes_per_target == stats.bytes / stats.targets


def test_histograms_count_every_target_or_row_once(any_dataset: Path) -> None:
    stats = measure_stats(any_dataset, progress=False)

    assert {name: getattr(stats, name).count for name in PER_TARGET} == dict.fromkeys(PER_TARGET, stats.targets)
    assert stats.label_rank.count + stats.label_rank.outside == stats.targets
    assert stats.row_tokens.count == stats.row_targets.count == stats.rows
    assert (stats.row_tokens.total, stats.row_targets.total) == (stats.tokens, stats.targets)


def test_bytes_by_column_add_up_to_the_shards(any_dataset: Path) -> None:
    stats = measure_stats(any_dataset, progress=False)
    frames = dict.fromkeys(STREAMS, 0)
    groups = 0
    for shard in open_dataset(any_dataset).shards:
        file = pq.ParquetFile(any_dataset / shard.file.name)
        groups += file.num_row_groups
        for record in file.read(columns=list(STREAMS)).to_pylist():
            for name, frame in record.items():
                frames[name] += len(frame)

    assert sum(stats.column_bytes.values()) == stats.bytes
    assert all(size > 0 for size in stats.column_bytes.values())
    for name, size in frames.items():
        pages = stats.column_bytes[name] - size - 4 * stats.rows
        assert 0 < pages <= 64 * groups, name


def test_stats_of_a_dataset_are_the_sum_over_its_shards(tmp_path: Path, tokenizer_folder: Path) -> None:
    rng = np.random.default_rng(5)
    shards = [[making.random_row(rng, f"{shard}-{row}") for row in range(3)] for shard in range(4)]
    header = making.tiny_header(tokenizer_folder)
    making.write_dataset(tmp_path / "whole", shards, header=header, tokenizer=tokenizer_folder)
    for number, rows in enumerate(shards):
        making.write_dataset(tmp_path / str(number), [rows], header=header, tokenizer=tokenizer_folder)

    parts = [measure_stats(tmp_path / str(number), progress=False) for number in range(4)]

    whole, joined = measure_stats(tmp_path / "whole", progress=False), reduce(add, parts)
    assert joined.dataset_ids == tuple(part.dataset_ids[0] for part in parts)
    assert joined.model_copy(update={"dataset_ids": whole.dataset_ids}) == whole


def test_stats_survive_json_which_holds_no_nan(any_dataset: Path) -> None:
    stats = measure_stats(any_dataset, progress=False)

    text = stats.model_dump_json()

    assert Stats.model_validate_json(text) == stats
    document = json.loads(text, parse_constant=pytest.fail)
    assert document["bytes_per_target"] == stats.bytes_per_target
    assert document["entropy"]["p50"] == stats.entropy.p50
    assert document["dataset_ids"] == [open_dataset(any_dataset).dataset_id]


def empty_dataset(root: Path, tokenizer: Path) -> Path:
    """A unit all of whose rows were rejected."""
    header = making.tiny_header(tokenizer)
    store = making.begin_dataset(root, header, tokenizer, [2])
    rejects = [Reject(number, f"bad-{number}", "too_long", "99 tokens") for number in range(2)]
    commit_unit(store, 0, rows=[], rejects=rejects, header=header, environment={})
    seal(store)
    return root


def test_a_dataset_without_rows_has_stats_too(tmp_path: Path, tokenizer_folder: Path) -> None:
    stats = measure_stats(empty_dataset(tmp_path / "empty", tokenizer_folder), progress=False)

    assert (stats.rows, stats.targets, stats.rejected, stats.shards) == (0, 0, 2, 1)
    assert (stats.bytes_per_target, stats.label_kept, stats.entropy.mean) == (None, None, None)
    assert stats.column_bytes[FOOTERS] == stats.bytes > 0
    assert "\x1b" not in shown(stats)


def shown(stats: Stats) -> str:
    sink = io.StringIO()
    show_stats(stats, console=Console(file=sink, width=80))
    return sink.getvalue()


def test_the_table_fits_80_columns_and_shows_the_figures(any_dataset: Path) -> None:
    stats = measure_stats(any_dataset, progress=False)

    text = shown(stats)

    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for value in (
        f"{stats.targets:,}",
        f"{stats.bytes:,} bytes",
        f"{stats.label_kept:.2%}",
        "not kept",
        "label_logprob",
    ):
        assert value in text


def damage_byte(root: Path) -> None:
    path = root / open_dataset(root).shards[1].file.name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove_shard(root: Path) -> None:
    (root / open_dataset(root).shards[1].file.name).unlink()


def lie_about_tokens(root: Path) -> None:
    document = json.loads((root / MANIFEST_NAME).read_text())
    document["tokens"] += 1
    document["shards"][2]["tokens"] += 1
    (root / MANIFEST_NAME).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("harm", "error"), [(damage_byte, ShardDamaged), (remove_shard, ShardMissing), (lie_about_tokens, ShardDamaged)]
)
def test_stats_of_a_damaged_dataset_are_a_named_error(
    tiny_dataset: Path, harm: Callable[[Path], None], error: type[Exception]
) -> None:
    harm(tiny_dataset)

    with pytest.raises(error):
        measure_stats(tiny_dataset, progress=False)


def test_stats_of_nothing_are_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFound):
        measure_stats(tmp_path, progress=False)
