"""Laws of one worker in this process: real teacher, shards and commits, and SIGKILL at any moment."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coldstill.pipeline.calibration import calibrate
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.errors import (
    AllRowsRejected,
    SourceChanged,
    SourceEmpty,
    TeacherOutputInvalid,
    TeacherUnusable,
    TemplateCannotMark,
)
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.teachers.protocol import (
    ScoredSequence,
    ScoreResult,
    Teacher,
    TokenSequence,
    UnscoredSequence,
    non_finite,
)
from coldstill.pipeline.worker import CaptureWorker, ExcludedRow, UnitTask, load_for, measure_speed
from coldstill.storage_schema.commits import committed_units, read_commit
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import HeaderMismatch, StorageFull, UnsupportedStore
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.rows import span_positions
from coldstill.storage_schema.store import Store
from coldstill.tools.verify import verify
from tests import making
from tests.conftest import SmallDisk
from tests.forking import fork_server
from tests.pipeline.capturing import capture_config, contents, do_units


def _do(config: CaptureConfig, units: list[int] | None = None) -> Store:
    prepared = prepare(config)
    worker = CaptureWorker(config)
    for unit in units if units is not None else [unit.index for unit in prepared.units]:
        worker.run(unit)
    return prepared.store


def test_every_source_row_is_in_the_dataset_or_among_the_rejects(tmp_path: Path) -> None:
    store = _do(capture_config(tmp_path))
    manifest = seal(store)
    assert (manifest.rows, manifest.rejected) == (40, 1)
    dataset = open_dataset(store.url)
    assert [row.sample_id for row in dataset.rows()] == [f"chat-{i}" for i in range(40)]
    assert dataset.row(7).metadata == {"topic": 1}
    (rejects,) = Path(store.url, "rejects").iterdir()
    assert json.loads(rejects.read_text())["reason"] == "no_messages"
    assert verify(store.url, deep=True, progress=False) == []


def test_the_stored_targets_are_the_tokens_of_the_assistant(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = capture_config(tmp_path)
    store = _do(config)
    seal(store)
    tokenizer = AutoTokenizer.from_pretrained(Path(store.url, "tokenizer"))
    row = open_dataset(store.url).row(3)
    assert tokenizer.decode(row.token_ids[span_positions(row.target_spans) + 1]) == "It is 12. Yes. Yes. Yes.</s>"


def test_units_in_any_order_and_twice_give_the_same_dataset(tmp_path: Path) -> None:
    first = _do(capture_config(tmp_path))
    second = _do(capture_config(tmp_path, output="second"), [4, 2, 2, 0, 1, 3, 0])
    seal(first), seal(second)
    assert open_dataset(first.url).dataset_id == open_dataset(second.url).dataset_id


def test_a_committed_unit_is_never_written_again(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    store = _do(config, [0])
    record = Path(store.url, "commits", "000000.json")
    before = (record.stat().st_ino, record.stat().st_mtime_ns)
    _do(config, [0])
    assert (record.stat().st_ino, record.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"teacher": {"top_k": 9}}, "top_k"),
        ({"teacher": {"draws": 9}}, "draws"),
        ({"source": {"loss_on": "all"}}, "loss_on"),
        ({"rows_per_unit": 7}, "rows_per_unit"),
    ],
)
def test_a_changed_configuration_on_an_existing_dataset_is_named(tmp_path: Path, changes: dict, field: str) -> None:
    prepare(capture_config(tmp_path))
    with pytest.raises(HeaderMismatch, match=field):
        prepare(capture_config(tmp_path, **changes))


def test_a_changed_source_or_teacher_on_an_existing_dataset_is_named(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    prepare(config)
    making.write_jsonl(tmp_path / "rows.jsonl", making.chat_rows(41))
    with pytest.raises(HeaderMismatch, match="source_sha256"):
        prepare(config)
    making.chat_model(tmp_path / "teacher", seed=1)
    with pytest.raises(HeaderMismatch, match="teacher"):
        prepare(config)


def test_a_source_that_shrinks_under_a_worker_is_named(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    prepare(config)
    making.write_jsonl(tmp_path / "rows.jsonl", making.chat_rows(3))
    with pytest.raises(SourceChanged, match="unit 0"):
        CaptureWorker(config).run(0)


def test_bad_settings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    with pytest.raises(TeacherUnusable, match=r"teacher\.model"):
        prepare(capture_config(tmp_path, teacher={"model": str(tmp_path / "absent")}))
    with pytest.raises(TeacherUnusable, match="top_k"):
        prepare(capture_config(tmp_path, teacher={"top_k": 4000}))
    with pytest.raises(TeacherUnusable, match=r"at most 512, the context"):
        prepare(capture_config(tmp_path, teacher={"max_length": 513}))
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ '' if loop.last else '~' }}{{ m.content }}{% endfor %}")
    with pytest.raises(TemplateCannotMark, match="generation"):
        prepare(capture_config(tmp_path, source={"chat_template": str(template)}))
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(SourceEmpty, match="no rows"):
        prepare(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(UnsupportedStore, match="a file"):
        prepare(capture_config(tmp_path, output="file"))
    assert not Path(config.output).exists()


def test_a_full_disk_raises_storage_full_and_committed_units_stay_good(tmp_path: Path, small_disk: SmallDisk) -> None:
    small_disk.resize("96k")
    config = capture_config(tmp_path, output="small disk/dataset")
    with pytest.raises(StorageFull, match="No space left"):
        _do(config)
    store = Store(config.output)
    done = committed_units(store)
    assert 0 < len(done) < 5
    for unit in done:
        record = read_commit(store, unit)
        assert contents(config.output)[Path(record.shard.name).name] == record.shard.sha256
    small_disk.resize("8m")
    unbroken = _do(capture_config(tmp_path, output="unbroken"))
    resumed = _do(config)
    seal(unbroken), seal(resumed)
    assert contents(resumed.url) == contents(unbroken.url)


class Meeting:
    """A teacher that counts how many calls ran at once; each call waits a moment for another."""

    environment: dict[str, object] = {}
    progress = 0
    processes = ()

    def __init__(self, teacher: Teacher):
        self._teacher, self._lock = teacher, threading.Lock()
        self._here = self.most = 0
        self.calls = 0

    def score(self, sequences: Sequence[TokenSequence]) -> list[ScoredSequence]:
        with self._lock:
            self._here += 1
            self.calls += 1
            self.most = max(self.most, self._here)
        deadline = time.monotonic() + 0.5
        while self.most < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            return self._teacher.score(sequences)
        finally:
            with self._lock:
                self._here -= 1


@pytest.mark.parametrize(("order", "most"), [("exact", 1), ("fast", 2)])
def test_calls_of_the_teacher_overlap_only_where_order_is_fast(tmp_path: Path, order: str, most: int) -> None:
    config = capture_config(tmp_path, order=order)
    prepared = prepare(config)
    teacher = Meeting(load_for(config, prepared.header))
    worker = CaptureWorker(config, teacher)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(worker.run, range(5)))
    assert teacher.most == most
    unbroken = _do(capture_config(tmp_path, output="unbroken", order=order))
    assert contents(config.output) == contents(unbroken.url)


def test_the_next_unit_is_scored_while_one_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = capture_config(tmp_path)
    prepared = prepare(config)
    teacher = Meeting(load_for(config, prepared.header))
    worker = CaptureWorker(config, teacher)
    put, is_scored = worker.store.put, []

    def put_after_the_next_call(name: str, data: bytes) -> None:
        deadline = time.monotonic() + 60
        while teacher.calls < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        is_scored.append(teacher.calls >= 2)
        put(name, data)

    monkeypatch.setattr(worker.store, "put", put_after_the_next_call)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(worker.run, range(2)))
    assert all(is_scored)


def test_excluded_rows_become_rejects_and_parts_give_the_same_rows(tmp_path: Path) -> None:
    whole = _do(capture_config(tmp_path, output="whole"), [0])
    config = capture_config(tmp_path)
    prepare(config)
    worker = CaptureWorker(config)
    worker.probe(0, 3, 7)
    assert committed_units(worker.store) == set()
    task = UnitTask(
        unit=0,
        kind="parts",
        start=0,
        stop=10,
        excluded=(ExcludedRow(source_row=4, detail="it hung"),),
        parts=((5, 10), (0, 4)),
    )
    report = worker.run(0, task)
    assert (report.rows, report.rejected) == (9, 1)
    record = read_commit(worker.store, 0)
    assert record.environment["parts"] == 2
    assert record.rejects is not None
    assert json.loads(worker.store.read(record.rejects.name)) == {
        "source_row": 4,
        "sample_id": "chat-4",
        "reason": "kills_the_engine",
        "detail": "it hung",
    }
    kept, all_rows = (list(read_shard(store)) for store in (worker.store, whole))
    assert kept == [row for row in all_rows if row != "chat-4"]


def read_shard(store: Store) -> list[str]:
    """Sample ids of the first unit's shard, in order."""
    import pyarrow.parquet as pq

    with store.open(read_commit(store, 0).shard.name) as file:
        return pq.read_table(file, columns=["sample_id"])["sample_id"].to_pylist()


def test_a_worker_killed_at_any_moment_leaves_nothing_half_written(tmp_path: Path) -> None:
    """SIGKILL at seeded moments until the capture is complete: the same bytes as an unbroken one."""
    unbroken = _do(capture_config(tmp_path, rows=400, output="unbroken"))
    config = capture_config(tmp_path, rows=400)
    prepare(config)
    processes = fork_server()
    store, moments, kills = Store(config.output), random.Random(0), 0
    while len(done := committed_units(store)) < 41:
        process = processes.Process(target=do_units, args=(config,))
        process.start()
        wanted, pause = len(done) + moments.randrange(1, 5), moments.uniform(0, 0.03)
        while process.is_alive() and len(committed_units(store)) < wanted:
            time.sleep(0.001)
        time.sleep(pause)
        kills += process.is_alive()
        process.kill()
        process.join()
        for unit in committed_units(store):
            record = read_commit(store, unit)
            assert contents(store.url)[Path(record.shard.name).name] == record.shard.sha256
    assert kills >= 4
    seal(store), seal(unbroken)
    assert contents(config.output) == contents(unbroken.url)
    assert open_dataset(config.output).dataset_id == open_dataset(unbroken.url).dataset_id


class _Poisoned:
    """A teacher that gives no finite logits for some rows."""

    def __init__(self, teacher: Teacher, *poison: int):
        self._teacher, self._poison = teacher, poison

    def __getattr__(self, name: str) -> object:
        return getattr(self._teacher, name)

    def score(self, sequences: Sequence[TokenSequence]) -> list[ScoreResult]:
        results = self._teacher.score(sequences)
        return [
            non_finite(sequence.sample_id, sequence.source_row) if sequence.source_row in self._poison else result
            for sequence, result in zip(sequences, results, strict=True)
        ]


def _poisoned(config: CaptureConfig, *poison: int) -> CaptureWorker:
    teacher = load_for(config, prepare(config).header)
    return CaptureWorker(config, _Poisoned(teacher, *poison))  # type: ignore[arg-type]


def test_a_row_without_finite_logits_is_one_reject_and_every_other_row_is_stored_as_without_it(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    whole = _do(config)
    other = capture_config(tmp_path, output="other")
    worker = _poisoned(other, 13)
    reports = [worker.run(unit) for unit in range(5)]
    assert [report.rejected for report in reports] == [0, 1, 0, 0, 1]
    record = read_commit(worker.store, 1).rejects
    assert record is not None
    assert json.loads(worker.store.read(record.name)) == {
        "source_row": 13, "sample_id": "chat-13", "reason": "non_finite_logits", "detail": "NaN or infinity",
    }  # fmt: skip
    seal(whole), seal(worker.store)
    shards, poisoned = contents(whole.url), contents(worker.store.url)
    assert [a == b for a, b in zip(shards.items(), poisoned.items(), strict=True)] == [True, False, True, True, True]
    kept = {row.sample_id: row for row in open_dataset(worker.store.url).rows()}
    assert set(kept) == {f"chat-{i}" for i in range(40) if i != 13}
    for row in open_dataset(whole.url).rows():
        if row.sample_id in kept:
            assert row.targets.ids.tobytes() == kept[row.sample_id].targets.ids.tobytes()
            assert row.targets.logprobs.tobytes() == kept[row.sample_id].targets.logprobs.tobytes()


def test_a_teacher_without_finite_logits_for_most_rows_is_an_error_and_commits_nothing(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    worker = _poisoned(config, *range(9))
    with pytest.raises(TeacherOutputInvalid, match=r"(?s)unit 0.*9 of 10.*a single row without them is rejected"):
        worker.run(0)
    assert committed_units(worker.store) == set()
    assert [worker.run(unit).rejected for unit in (1, 2, 3)] == [0, 0, 0]


def test_rows_that_are_rejected_for_their_images_do_not_tell_of_a_broken_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where most of a unit's images take more tokens than teacher.max_length."""
    config = capture_config(tmp_path)
    worker = _poisoned(config, *range(9))
    too_long = UnscoredSequence("", 0, RejectReason.OVER_LONG, "300 tokens, 290 of them of 2 images; at most 256")
    monkeypatch.setattr(
        "tests.pipeline.test_worker.non_finite",
        lambda sample_id, source_row: too_long._replace(sample_id=sample_id, source_row=source_row),
    )
    report = worker.run(0)
    assert report.rejected == 9
    assert report.reasons == {"over_long": 9}


def test_small_units_are_judged_together(tmp_path: Path) -> None:
    """Of a unit of two rows, one poison row is half: the teacher is broken only if this goes on."""
    config = capture_config(tmp_path, rows_per_unit=2)
    worker = _poisoned(config, 0, 1, *range(20, 40))
    assert [worker.run(unit).rejected for unit in range(10)] == [2, *[0] * 9]
    done = []
    with pytest.raises(TeacherOutputInvalid, match="of 16"):
        done += [worker.run(unit).rejected for unit in range(10, 20)]
    assert committed_units(worker.store) == set(range(14))


def test_the_measurement_of_speed_and_the_calibration_pass_over_a_row_without_finite_logits(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    prepared = prepare(config)
    teacher = _Poisoned(load_for(config, prepared.header), 0)
    assert calibrate(config, teacher, prepared.header, prepared.units[0]).id_ranks  # type: ignore[arg-type]
    sequences = CaptureWorker(config, teacher)._sequences(0)[0]  # type: ignore[arg-type]
    assert measure_speed(teacher, prepared.header, sequences, seconds=0).targets > 0  # type: ignore[arg-type]
    teacher = _Poisoned(load_for(config, prepared.header), *range(8))
    with pytest.raises(AllRowsRejected, match="8 non_finite_logits"):  # not an estimate of years
        measure_speed(teacher, prepared.header, sequences[:8], seconds=0)  # type: ignore[arg-type]


def test_an_absent_model_is_named_at_once_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client would repeat each request for a minute."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("no name resolves")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    started = time.monotonic()
    with pytest.raises(TeacherUnusable, match="the Hub cannot be reached"):
        prepare(capture_config(tmp_path, teacher={"model": "no-such-owner/no-such-model"}))
    assert time.monotonic() - started < 20
