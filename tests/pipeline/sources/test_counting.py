"""Laws of the dry run: its counts are those of the capture, in each mode, and it writes nothing."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from coldstill.pipeline.preparation.prepare import prepare
from coldstill.pipeline.sequences import TokenSequence
from coldstill.pipeline.sources.chat import SequenceMaker
from coldstill.pipeline.sources.counting import SourceCounts, count_source
from coldstill.pipeline.sources.readers import open_source
from coldstill.storage_schema.manifest import seal
from tests import making
from tests.pipeline.capturing import capture_config, do_units


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
