"""Laws of the calibration pass: its table ranks ids by how often they are kept, and changes nothing but bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from coldstill.pipeline.calibration import FLAT_TAIL_MASS, calibrate, warn_if_flat
from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.teachers.protocol import ScoredSequence, Teacher, TokenSequence
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import StorageFailed
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.store import Store
from coldstill.tools.verify import verify
from tests import making
from tests.pipeline.capturing import capture_config, do_units


def _ranked(folder: Path, **changes: object) -> tuple[Path, DatasetHeader]:
    """A whole capture with a table, by the driver's own steps."""
    config = capture_config(folder, **changes)

    def rank_ids(header: DatasetHeader, unit: Unit) -> tuple[int, ...]:
        return calibrate(config, load_teacher(config.teacher, header), header, unit).id_ranks

    prepared = prepare(config, rank_ids=rank_ids)
    do_units(config)
    seal(prepared.store)
    return Path(config.output), prepared.header


def test_the_table_ranks_ids_by_how_often_they_are_kept_or_drawn(tmp_path: Path) -> None:
    root, header = _ranked(tmp_path, calibration_targets=10**6)
    counts: Counter[int] = Counter()
    for row in open_dataset(root).read_shard(0):
        counts.update(row.targets.ids[row.targets.kept].tolist())
        counts.update(row.targets.draw_ids.tolist())
    wanted = sorted((token for token, count in counts.items() if count > 1), key=lambda token: (-counts[token], token))
    assert header.id_ranks == tuple(wanted)


def test_a_table_changes_the_bytes_and_nothing_else(tmp_path: Path) -> None:
    root, header = _ranked(tmp_path)
    plain = capture_config(tmp_path, output="plain")
    store = prepare(plain).store
    do_units(plain)
    seal(store)
    assert header.id_ranks
    assert verify(root, deep=True, progress=False) == []
    for with_table, without in zip(open_dataset(root).rows(), open_dataset(plain.output).rows(), strict=True):
        assert with_table.sample_id == without.sample_id
        mine, theirs = with_table.targets.by_probability(), without.targets.by_probability()
        np.testing.assert_array_equal(mine.ids, theirs.ids)
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-6)


def test_a_few_targets_are_enough_for_a_table(tmp_path: Path) -> None:
    _, some = _ranked(tmp_path, calibration_targets=1)
    assert 0 < len(some.id_ranks) < len(_ranked(tmp_path, output="all")[1].id_ranks)


class _Answering:
    """A teacher at its protocol: each answer has three targets, and records its prompt."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def score(self, prompts: Sequence[TokenSequence]) -> list[ScoredSequence]:
        self.calls.append([prompt.sample_id for prompt in prompts])
        assert all(not prompt.target_spans.size for prompt in prompts)
        probs = making.random_probs(np.random.default_rng(0), 3, 64)
        targets = making.targets_of(probs, np.zeros(3, int), top_k=2)
        return [ScoredSequence(prompt, targets) for prompt in prompts]


def test_the_calibration_pass_of_mode_generate_asks_for_a_few_answers_until_it_has_its_targets(tmp_path: Path) -> None:
    config = capture_config(tmp_path, mode="generate", calibration_targets=10, sampling={"max_tokens": 5})
    prepared = prepare(config)
    teacher = _Answering()
    ranks = calibrate(config, cast(Teacher, teacher), prepared.header, prepared.units[0]).id_ranks
    # Two prompts would do, were the answers as long as they may be; one more for what is missing, and another.
    assert teacher.calls == [["chat-0", "chat-1"], ["chat-2"], ["chat-3"]]
    assert ranks


def test_a_first_unit_of_rejects_alone_gives_no_table(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    making.write_jsonl(tmp_path / "rows.jsonl", [{"id": "useless"}, *making.chat_rows(3)])
    prepared = prepare(capture_config(tmp_path, rows_per_unit=1))
    assert calibrate(config, cast(Teacher, None), prepared.header, prepared.units[0]) == ((), 0.0)


def test_the_calibration_pass_outlasts_a_store_that_fails_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the units do: `cluster.store_retry_s` is the time of all work of a worker."""
    config = capture_config(tmp_path, mode="generate", calibration_targets=10)
    prepared = prepare(config)
    read, failures = Store.read, [StorageFailed("reading staging/source.json", found="503")]

    def failing(store: Store, name: str, *, at_most: int | None = None) -> bytes:
        if failures:
            raise failures.pop()
        return read(store, name, at_most=at_most)

    monkeypatch.setattr(Store, "read", failing)
    assert calibrate(config, cast(Teacher, _Answering()), prepared.header, prepared.units[0]).id_ranks
    assert not failures


def test_a_dataset_keeps_the_table_that_it_was_started_with(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    first = prepare(config, rank_ids=lambda header, unit: (5, 3, 8))
    again = prepare(config, rank_ids=lambda header, unit: pytest.fail("a second calibration pass"))
    assert first.header == again.header
    assert again.header.id_ranks == (5, 3, 8)


def test_the_tail_mass_is_the_mean_over_the_scored_targets(tmp_path: Path) -> None:
    config = capture_config(tmp_path, calibration_targets=10**6)
    prepared = prepare(config)
    found = calibrate(config, load_teacher(config.teacher, prepared.header), prepared.header, prepared.units[0])
    do_units(config)
    seal(prepared.store)
    logs = [row.targets.log_tail for row in open_dataset(config.output).read_shard(0)]
    assert found.tail_mass == pytest.approx(np.exp(np.concatenate(logs)).mean(), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({"draws": 0}, "set teacher.draws: 64"),
        ({"tap": "public"}, "use tap worker or engine transformers"),
        ({"draws": 64}, None),
    ],
)
def test_a_capture_without_draws_of_a_flat_teacher_warns_with_the_setting(
    caplog: pytest.LogCaptureFixture, settings: dict, way: str | None
) -> None:
    teacher = TeacherConfig.model_validate({"model": "m", **settings})
    warn_if_flat(teacher, FLAT_TAIL_MASS)
    assert caplog.messages == []
    warn_if_flat(teacher, 0.051)
    assert len(caplog.messages) == (way is not None)
    if way:
        assert way in caplog.text
        assert "0.051 of the teacher's mass" in caplog.text
