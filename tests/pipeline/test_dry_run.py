"""Laws of a dry run: its counts are those of the capture, its output is not touched, its bytes are near the truth."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.dry_run import DryRun, SourceCounts, count_source, dry_run
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.expected_bytes import (
    BYTES_OF_DRAWS,
    BYTES_PER_TARGET,
    TOP_KS,
    bytes_per_target,
    most_bytes_per_target,
)
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.sources.source import open_source
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.codec import MOST_ROW_OVERHEAD, RowCodec
from coldstill.storage_schema.header import Codec, DatasetHeader
from coldstill.storage_schema.manifest import Manifest, seal
from coldstill.storage_schema.rows import TeacherTargets
from tests import making
from tests.pipeline.capturing import capture_config, do_units, write_config

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "codec_2_cores.json"


def captured(config: CaptureConfig) -> Manifest:
    """The same settings captured, in this process."""
    prepared = prepare(config)
    do_units(config)
    return seal(prepared.store)


def test_what_is_counted_is_what_a_capture_gives_and_nothing_is_written(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    dry = dry_run(config, progress=False)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path(config.output).exists()
    manifest = captured(config)
    assert (dry.rows, sum(dry.rejected.values()), dry.shards) == (41, manifest.rejected, len(manifest.shards))
    assert (dry.sequences, dry.tokens, dry.targets) == (manifest.rows, manifest.tokens, manifest.targets)
    assert dry.targets_are == "counted"
    assert dry.effort is None


@pytest.mark.parametrize("wrong", [{"max_length": 4096}, {"top_k": 500}])
def test_settings_that_the_teacher_cannot_have_are_refused_as_the_capture_refuses_them(
    tmp_path: Path, wrong: dict[str, int]
) -> None:
    config = capture_config(tmp_path, teacher=wrong)
    with pytest.raises(TeacherUnusable) as of_capture:
        prepare(config)
    with pytest.raises(TeacherUnusable) as of_dry_run:
        dry_run(config, progress=False)
    assert str(of_dry_run.value) == str(of_capture.value)


def test_the_directory_of_a_capture_that_is_under_way_is_not_touched(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    captured(config)
    stamps = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")}
    dry_run(config, progress=False)
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")} == stamps


def test_a_probe_measures_a_real_worker_and_writes_nothing_either(tmp_path: Path) -> None:
    config = capture_config(
        tmp_path, cluster={"max_workers": 2, "gpus_per_worker": 0, "price_per_gpu_hour": 3.0}, calibration_targets=0
    )
    dry = dry_run(config, probe=True, probe_s=1.0, progress=False)
    assert not Path(config.output).exists()
    effort = dry.effort
    assert effort is not None
    assert effort.tokens_per_s > 0
    assert effort.worker_hours * 3600 * effort.tokens_per_s == pytest.approx(dry.tokens, rel=1e-6)
    assert effort.hours == pytest.approx(effort.worker_hours / 2)
    assert (effort.gpu_hours, effort.cost) == (0, 0)
    assert dry.bytes_from == dry.bytes_to
    size = sum(shard.file.bytes for shard in captured(config).shards)
    assert dry.bytes_to == pytest.approx(size, rel=0.5)  # the shards of so small a capture are mostly footer


@pytest.mark.parametrize("targets", [1, 250_000, 30_000_000])
def test_bytes_per_million_targets_are_the_total_over_the_targets_at_both_ends(targets: int) -> None:
    """As fields, and in what is printed and written by --summary."""
    counts = {"rows": 1, "rejected": {}, "sequences": 1, "tokens": targets, "targets": targets, "shards": 1}
    dry = DryRun(
        **counts,
        targets_are="counted",
        bytes_from=20_300_000,
        bytes_to=58_100_000,
        bytes_most=99_000_000,
        bytes_are="of a sharp and a flat teacher",
    )
    lines = dry.lines()
    for end in ("from", "to"):
        per_million = lines[f"bytes_per_million_targets_{end}"]
        assert per_million == getattr(dry, f"bytes_per_million_targets_{end}")
        assert isinstance(per_million, int)
        assert per_million * targets / 1e6 == pytest.approx(lines[f"bytes_{end}"], abs=targets / 1e6)


def test_of_generated_answers_only_a_bound_is_known_before(tmp_path: Path) -> None:
    config = capture_config(tmp_path, mode="generate", sampling={"n": 2, "max_tokens": 7})
    dry = dry_run(config, progress=False)
    assert dry.targets_are == "at most"
    assert dry.targets == dry.sequences * 2 * 7


def test_the_bound_of_answers_ends_where_max_length_leaves_no_room_for_more_tokens(tmp_path: Path) -> None:
    config = capture_config(tmp_path, mode="generate", sampling={"n": 3, "max_tokens": 4096})
    dry = dry_run(config, progress=False)
    assert dry.targets == 3 * (dry.sequences * config.teacher.max_length - dry.tokens)
    assert dry.bytes_from <= dry.bytes_to <= dry.bytes_most


def test_the_expected_bytes_are_those_of_the_stored_benchmark() -> None:
    lines = json.loads(RESULT.read_text())["lines"]
    measured = {(line["side"], line["teacher"], line["top_k"], line["min_prob"], line["draws"]): line for line in lines}

    def of(fidelity: str, floor: float, draws: int, sharpness: str, top_k: int) -> float:
        return float(measured[f"ours, {fidelity}", sharpness, top_k, floor, draws]["bytes"])

    for (fidelity, has_floor, sharpness), values in BYTES_PER_TARGET.items():
        found = [of(fidelity, 1e-4 if has_floor else 0.0, 0, sharpness, top_k) for top_k in TOP_KS]
        assert values == pytest.approx(found, rel=0.05)
    for sharpness in ("sharp", "flat"):
        values = list(BYTES_OF_DRAWS["iid", sharpness].values())
        found = [of("fine", 0.0, 64, sharpness, k) - of("fine", 0.0, 0, sharpness, k) for k in TOP_KS]
        assert values == pytest.approx(found, rel=0.1, abs=0.2)


def settings(**teacher: object) -> CaptureConfig:
    document = {
        "output": "o",
        "source": {"path": "x.jsonl"},
        "teacher": {"model": "m", **teacher},
        "calibration_targets": 0,
    }
    return CaptureConfig.model_validate(document)


def test_more_ids_and_draws_are_more_bytes() -> None:
    bare = {"min_prob": 0.0, "draws": 0}
    sizes = [bytes_per_target(settings(top_k=top_k, **bare)).most for top_k in (1, 8, 16, 50, 64, 128, 256)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == pytest.approx(2 * sizes[-2])
    plain = bytes_per_target(settings(top_k=16, draws=0))
    for method, of_draws in (("iid", 30.6), ("systematic", 40.5)):
        drawn = bytes_per_target(settings(top_k=16, draws=64, draw_method=method))
        assert drawn.most - plain.most == pytest.approx(of_draws)
        assert drawn.least > plain.least


def test_the_estimate_of_systematic_draws_is_the_stored_measurement() -> None:
    stored = json.loads(RESULT.with_name("draws_bytes_2_cores.json").read_text())
    for sharpness in ("flat", "sharp"):
        bytes_of = {(line["top_k"], line["draws"]): line["bytes"] for line in stored[sharpness]}
        estimated = BYTES_OF_DRAWS["systematic", sharpness]
        for top_k, value in estimated.items():
            assert value == pytest.approx(bytes_of[top_k, "systematic"] - bytes_of[top_k, "none"], abs=0.06)
        found = bytes_per_target(settings(top_k=8, draws=0))
        estimate = found.most if sharpness == "flat" else found.least
        assert estimate == pytest.approx(bytes_of[8, "none"], rel=0.2)


def test_the_command_prints_the_counts_and_writes_them_where_asked(tmp_path: Path) -> None:
    config = write_config(tmp_path / "capture.yaml", capture_config(tmp_path))
    command = [sys.executable, "-m", "coldstill", "capture", str(config), "--dry-run", "--summary", str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "s").read_text())
    assert document["rows"] == 41
    assert document["rejected: no_messages"] == 1
    assert document["such as: no_messages"].startswith("row ")
    assert "rejected: no messages" in done.stdout
    assert not (tmp_path / "dataset").exists()


def _counted(config: Any) -> SourceCounts:
    source = open_source(config.source)
    units = source.plan(config.rows_per_unit)
    return count_source(config, units=units, source=source, maker=SequenceMaker.of(config), progress=False)


def test_the_counts_are_those_of_the_capture(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    counts = _counted(config)
    assert not Path(config.output).exists()
    store = prepare(config).store
    do_units(config)
    manifest = seal(store)
    assert (counts.rows, counts.sequences, counts.tokens, counts.targets) == (
        41,
        manifest.rows,
        manifest.tokens,
        manifest.targets,
    )
    assert counts.rejected == {"no_messages": 1}


def test_a_source_that_cannot_be_sought_is_counted_without_staging(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    path = tmp_path / "rows.jsonl"
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert _counted(capture_config(tmp_path, source={"path": str(packed)})) == _counted(config)
    assert not Path(config.output).exists()


def test_of_answers_the_most_that_they_may_have_is_counted(tmp_path: Path) -> None:
    config = capture_config(tmp_path, mode="generate", sampling={"n": 3, "max_tokens": 240})
    counts = _counted(config)
    made = SequenceMaker.of(config).sequences(open_source(config.source).rows())
    sizes = [prompt.token_ids.size for prompt in made if isinstance(prompt, TokenSequence)]
    assert counts.tokens == sum(sizes)
    assert counts.targets == 3 * sum(min(240, 256 - size) for size in sizes)
    assert any(256 - size < 240 for size in sizes)


@pytest.mark.parametrize("documents", ["isolate", "concat"])
def test_documents_are_counted(tmp_path: Path, documents: str) -> None:
    config = capture_config(tmp_path, mode="pretrain", documents=documents)
    making.write_jsonl(tmp_path / "rows.jsonl", [{"text": "x" * 99} for _ in range(20)])
    counts = _counted(config)
    assert counts.tokens == 2000
    assert counts.sequences == (20 if documents == "isolate" else 8)
    assert counts.targets == 2000 - counts.sequences


@pytest.mark.parametrize("notes", [False, True])
def test_the_range_of_bytes_holds_metadata_and_the_shards_own_bytes(tmp_path: Path, notes: bool) -> None:
    """Random targets in many small shards: what was left out was a third of the bytes and more."""
    import random

    config = capture_config(tmp_path, rows_per_unit=5, calibration_targets=0)
    rng = random.Random(0)
    rows = [{**row, **({"note": f"{rng.getrandbits(8000):x}"} if notes else {})} for row in making.chat_rows(40)]
    making.write_jsonl(tmp_path / "rows.jsonl", rows)
    dry = dry_run(config, progress=False)
    size = sum(shard.file.bytes for shard in captured(config).shards)
    assert 0.9 * dry.bytes_from <= size <= 1.1 * dry.bytes_to
    assert dry.bytes_to < 1.8 * dry.bytes_from


class _Random:
    """Targets that nothing can compress: random ids over the whole vocabulary, random log-probs, all draws distinct."""

    def __init__(self, header: DatasetHeader, seed: int = 0):
        self._header, self._rng = header, np.random.default_rng(seed)

    def targets(self, positions: int) -> TeacherTargets:
        header, rng = self._header, self._rng
        shuffled = np.argsort(rng.random((positions, header.token_count)), axis=1)[
            :, : header.top_k + header.kept_draws
        ]
        ids, draws = np.split(shuffled.astype(np.int32), [header.top_k], axis=1)
        logprobs = -np.sort(rng.uniform(5, 60, ids.shape), axis=1).astype(np.float32)
        return TeacherTargets(
            ids=ids,
            logprobs=logprobs,
            counts=np.full(positions, header.top_k, np.int32),
            log_tail=rng.uniform(-0.01, 0, positions).astype(np.float32),
            label_logprob=rng.uniform(-60, -5, positions).astype(np.float32),
            draw_ids=draws.reshape(-1),
            draw_counts=np.full(positions, header.kept_draws, np.int32),
            draw_logprobs=rng.uniform(-60, -5, draws.size).astype(np.float32) if header.draw_logprobs else None,
        )


@pytest.mark.parametrize("fidelity", ["fine", "coarse", "exact"])
@pytest.mark.parametrize("teacher", [{"top_k": 1, "draws": 0}, {"top_k": 64, "draws": 64, "draw_logprobs": True}])
@pytest.mark.parametrize("token_count", [300, 5_000, 100_000])
def test_targets_that_nothing_can_compress_take_no_more_than_the_bound(
    tmp_path: Path, fidelity: str, teacher: dict[str, Any], token_count: int
) -> None:
    config = settings(**teacher).model_copy(update={"fidelity": fidelity})
    header = making.tiny_header(
        making.tiny_tokenizer(tmp_path),
        top_k=config.teacher.top_k,
        draws=config.teacher.draws,
        token_count=token_count,
        vocab_size=token_count,
        draw_logprobs=config.teacher.draw_logprobs,
        codec=Codec.preset(config.fidelity, top_k=config.teacher.top_k),
    )
    for positions in (1, 300):
        targets = _Random(header).targets(positions)
        frames = RowCodec(header).encode(targets, labels=np.full(positions, token_count - 1, np.int32))
        size = sum(4 + len(frame) for frame in frames.values())
        most = most_bytes_per_target(config, token_count=token_count)
        assert size <= positions * most + MOST_ROW_OVERHEAD
        assert size > 0.3 * positions * most


@pytest.mark.parametrize("changes", [{}, {"mode": "generate", "sampling": {"n": 2, "max_tokens": 20}}])
@pytest.mark.parametrize("rows_per_unit", [1, 10])
def test_a_capture_of_a_flat_teacher_takes_no_more_than_the_most(
    tmp_path: Path, changes: dict[str, Any], rows_per_unit: int
) -> None:
    """A teacher of random weights is flat: no id of it is likelier than the others."""
    teacher = {"min_prob": 0.0, "top_k": 64, "draws": 64, "draw_logprobs": True}
    config = capture_config(
        tmp_path, rows=12, rows_per_unit=rows_per_unit, teacher=teacher, calibration_targets=0, **changes
    )
    dry = dry_run(config, progress=False)
    size = sum(shard.file.bytes for shard in captured(config).shards)
    assert size <= dry.bytes_most
    assert dry.bytes_to <= dry.bytes_most
