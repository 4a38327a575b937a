"""Laws of `source.adapter`: one function for rows of any format, part of what a resumed capture is compared with."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coldstill.common.plugins import PluginNotFound
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.dry_run import dry_run
from coldstill.pipeline.errors import AllRowsRejected, SourceAdapterFailed, SourceChanged
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.source import open_source
from coldstill.pipeline.sources.staging import remove_staging
from coldstill.pipeline.worker import CaptureWorker
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import HeaderMismatch
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.store import Store
from examples.source_adapter import to_chat
from tests.pipeline.capturing import capture_config, do_units

EXAMPLES = Path(__file__).parents[3] / "examples"
HERE = __name__
QUESTIONS: list[dict[str, Any]] = [
    {
        "key": f"q{n}",
        "question": f"{n} + 1?",
        "options": [str(n), str(n + 1)],
        "solution": f"B) {n + 1}",
        "subject": "sums",
    }
    for n in range(11)
]
QUESTIONS[4]["solution"] = None
"""The example's function drops it."""


def shout(row: dict[str, Any]) -> dict[str, Any] | None:
    """An adapter of the tests."""
    return {"id": row["key"], "text": row["question"].upper()}


def shout_again(row: dict[str, Any]) -> dict[str, Any] | None:
    """The same under another name."""
    return shout(row)


def fail_on_seven(row: dict[str, Any]) -> dict[str, Any]:
    """Raises for one row."""
    if row["key"] == "q7":
        raise KeyError("no such column\nand a second line")
    return {"text": row["question"]}


def give_a_list(row: dict[str, Any]) -> Any:
    """Returns a wrong type."""
    return [row]


def give_nothing(row: dict[str, Any]) -> dict[str, Any]:
    """Returns an empty result."""
    row.clear()
    return {}


def halve_a_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Returns half of a surrogate pair for one row, as `errors="surrogateescape"` makes of bytes that are not text."""
    return {"text": row["question"], "source": "\udcff" if row["key"] == "q7" else ""}


def give_a_tuple_as_key(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what JSON cannot hold."""
    return {"text": row["question"], "pairs": {(1, 2): 3}}


def _jsonl(folder: Path) -> SourceConfig:
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return SourceConfig(path=str(folder / "x.jsonl"))


def _gzip(folder: Path) -> SourceConfig:
    (folder / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, QUESTIONS)).encode()))
    return SourceConfig(path=str(folder / "x.jsonl.gz"))


def _parquet(folder: Path) -> SourceConfig:
    pq.write_table(pa.Table.from_pylist(QUESTIONS), folder / "x.parquet", row_group_size=3)
    return SourceConfig(path=str(folder / "x.parquet"))


def _dataset(folder: Path) -> SourceConfig:
    _parquet(folder)
    return SourceConfig(dataset=str(folder))


FORMATS: dict[str, Callable[[Path], SourceConfig]] = {
    "jsonl": _jsonl,
    "gzip": _gzip,
    "parquet": _parquet,
    "datasets": _dataset,
}


def _source(folder: Path, name: str, adapter: str) -> SourceConfig:
    folder.mkdir(exist_ok=True)
    return FORMATS[name](folder).model_copy(update={"adapter": adapter})


def _config(folder: Path, adapter: str, name: str = "jsonl", **changes: Any) -> CaptureConfig:
    """A capture of the questions, whose source a test may change."""
    source = _source(folder / "source", name, adapter)
    config = capture_config(folder, **changes)
    return config.model_copy(update={"source": source})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("with_store", [True, False])
def test_rows_of_every_format_pass_through_the_function(tmp_path: Path, name: str, with_store: bool) -> None:
    config = _source(tmp_path / "source", name, f"{HERE}:shout")
    store = Store(tmp_path / "dataset") if with_store else None
    wanted = [{"id": row["key"], "text": row["question"].upper()} for row in QUESTIONS]
    source = open_source(config, store)
    assert [row.columns for row in source.head(3)] == wanted[:3]
    plan = source.plan(4)
    assert [row.columns for unit in plan for row in source.read(unit)] == wanted
    assert [row.columns for row in source.rows()] == wanted
    if with_store:
        assert [row.columns for row in open_source(config, store).read(plan[1])] == wanted[4:8]


def test_the_example_makes_a_dataset_and_dropped_rows_are_rejects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    config = _config(tmp_path, "source_adapter:to_chat", rows_per_unit=4)
    dry = dry_run(config, progress=False)
    assert (dry.rows, dry.rejected) == (11, {"adapter_dropped": 1})
    prepared = prepare(config)
    do_units(config)
    seal(prepared.store)
    rows = list(open_dataset(config.output).rows())
    assert [row.sample_id for row in rows] == [row["key"] for row in QUESTIONS if row["solution"]]
    assert {row.metadata["subject"] for row in rows} == {"sums"}
    (file,) = Path(config.output, "rejects").iterdir()
    reject = json.loads(file.read_text())
    assert (reject["source_row"], reject["reason"]) == (4, "adapter_dropped")
    monkeypatch.delitem(sys.modules, "source_adapter")


def test_the_example_keeps_every_option_of_a_question() -> None:
    made = to_chat({"key": "a", "question": "Which?", "options": list("vwxyz"), "solution": "E"})
    assert made is not None
    assert made["messages"][0]["content"].splitlines() == ["Which?", "A) v", "B) w", "C) x", "D) y", "E) z"]


def test_an_empty_result_is_dropped_too(tmp_path: Path) -> None:
    with pytest.raises(AllRowsRejected, match="11 adapter_dropped"):
        dry_run(_config(tmp_path, f"{HERE}:give_nothing"), progress=False)


def test_a_line_that_is_not_an_object_does_not_reach_the_function(tmp_path: Path) -> None:
    config = _source(tmp_path / "source", "jsonl", f"{HERE}:shout")
    (tmp_path / "source" / "x.jsonl").write_text("[1]\n" + json.dumps(QUESTIONS[0]))
    first, second = open_source(config).rows()
    assert (first.columns, second.columns) == (None, {"id": "q0", "text": "0 + 1?".upper()})


def test_an_exception_of_the_function_is_named_with_the_row_and_its_first_line(tmp_path: Path) -> None:
    config = _config(tmp_path, f"{HERE}:fail_on_seven", rows_per_unit=4)
    with pytest.raises(SourceAdapterFailed, match=r"fail_on_seven: row 7\n.*KeyError: .*no such column") as raised:
        prepare(config)
    assert "\n" not in str(raised.value.found)


def test_a_worker_names_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path, f"{HERE}:fail_on_seven", rows_per_unit=4)
    monkeypatch.setattr("coldstill.pipeline.prepare._CHECKED_ROWS", 2)
    prepare(config)
    worker = CaptureWorker(config)
    worker.run(0)
    with pytest.raises(SourceAdapterFailed, match="row 7"):
        worker.run(1)


def test_a_result_of_another_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceAdapterFailed, match="returned list"):
        prepare(_config(tmp_path, f"{HERE}:give_a_list"))


def test_a_result_that_is_no_text_rejects_its_row_and_one_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    config = _config(tmp_path, f"{HERE}:halve_a_pair")
    prepare(config)
    do_units(config)
    (file,) = Path(config.output, "rejects").iterdir()
    assert [json.loads(line)["reason"] for line in file.read_text().splitlines()] == ["lone_surrogate"]
    with pytest.raises(SourceAdapterFailed, match="row 0"):
        open_source(_source(tmp_path / "source", "jsonl", f"{HERE}:give_a_tuple_as_key")).head()


def test_a_function_that_is_not_there_is_named_before_anything_is_written(tmp_path: Path) -> None:
    config = _config(tmp_path, f"{HERE}:absent")
    with pytest.raises(PluginNotFound, match=r"source\.adapter"):
        prepare(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize("other", [None, f"{HERE}:shout_again"])
@pytest.mark.parametrize("name", ["jsonl", "gzip"])
def test_a_changed_adapter_on_an_existing_dataset_is_named(tmp_path: Path, name: str, other: str | None) -> None:
    config = _config(tmp_path, f"{HERE}:shout", name)
    prepared = prepare(config)
    changed = config.model_copy(update={"source": config.source.model_copy(update={"adapter": other})})
    with pytest.raises(SourceChanged, match=r"source\.adapter"):
        prepare(changed)
    remove_staging(prepared.store)
    with pytest.raises(HeaderMismatch, match="source_sha256"):
        prepare(changed)
    remove_staging(prepared.store)
    assert prepare(config).header == prepared.header


def test_an_adapter_on_a_dataset_that_was_started_without_one_is_named(tmp_path: Path) -> None:
    config = _config(tmp_path, f"{HERE}:shout")
    config = config.model_copy(update={"source": config.source.model_copy(update={"text": "question"})})
    plain = config.model_copy(update={"source": config.source.model_copy(update={"adapter": None})})
    prepare(plain)
    with pytest.raises(SourceChanged, match=r"source\.adapter"):
        prepare(config)


def test_without_an_adapter_the_index_is_that_of_earlier_releases(tmp_path: Path) -> None:
    store = Store(tmp_path / "dataset")
    open_source(_jsonl(tmp_path), store).plan(4)
    settings = json.loads(store.read("staging/source.json"))["settings"]
    assert set(settings) == {"dataset_config", "split", "messages", "tools", "prompt", "response", "text", "id"}
