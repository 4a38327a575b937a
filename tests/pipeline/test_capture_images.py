"""Laws of captures with images from a source to a sealed dataset, by real engines."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldstill.pipeline.calibration import calibrate
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.worker import CaptureWorker, load_for
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.rows import CachedRow
from coldstill.tools.verify import verify
from tests import making, vision
from tests.pipeline.capturing import capture_config, contents

ROWS = 12


def _row(number: int) -> dict[str, Any]:
    """One, two or three images, and none in every fourth row."""
    images = [vision.image_bytes(10 * number + n, size=(40 + 7 * n, 60 - number)) for n in range(number % 4)]
    return {
        "id": f"row {number}",
        "messages": [
            {"role": "user", "content": "<image>, ".join(["Look: ", *[""] * len(images)]) + "which is it?"},
            {"role": "assistant", "content": f"It is number {number}."},
        ],
        "images": [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in images],
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.idefics3_model(tmp_path_factory.mktemp("models") / "tiles", splits=True, seed=2)


def _config(folder: Path, model: Path, engine: str, output: str, **changes: Any) -> CaptureConfig:
    path = folder / "rows.jsonl"
    if not path.exists():
        unreadable = {**_row(1), "id": "unreadable", "images": ["data:image/png;base64,AAAA"]}
        making.write_jsonl(path, [*map(_row, range(ROWS)), unreadable])
    (folder / "teacher").mkdir(exist_ok=True)
    teacher = {"model": str(model), "engine": engine, "dtype": "float32", "max_length": 300}
    if engine == "vllm":
        teacher["engine_args"] = making.SMALL_ENGINE
    source = {"path": str(path), "images_in_row_bytes": 8000}
    more = {"rows_per_unit": 5, "fidelity": "exact", **changes}
    return capture_config(folder, teacher=teacher, source=source, output=str(folder / output), **more)


def _captured(config: CaptureConfig, *, units: int = 1) -> Path:
    """The dataset; each worker, with an engine of its own, does at most `units` units."""
    prepared = prepare(config)
    todo = [unit.index for unit in prepared.units]
    for start in range(0, len(todo), units):
        worker = CaptureWorker(config)
        os.environ.pop("LD_PRELOAD", None)  # set by vLLM for its children
        for index in todo[start : start + units]:
            worker.run(index)
    seal(prepared.store)
    assert verify(config.output, deep=True, progress=False) == []
    return Path(config.output)


def _rows(root: Path) -> list[CachedRow]:
    return list(open_dataset(root).rows())


def test_rows_with_images_are_captured_with_their_images_and_the_others_as_before(tmp_path: Path, model: Path) -> None:
    root = _captured(_config(tmp_path, model, "transformers", "plain"), units=9)
    rows = _rows(root)
    assert [len(row.media) for row in rows] == [number % 4 for number in range(ROWS)]
    placeholder = open_dataset(root).header.about.processor.settings["image_token_id"]  # type: ignore[union-attr]
    for row in rows:
        assert np.flatnonzero(row.token_ids == placeholder).tolist() == [medium.position for medium in row.media]
        assert row.targets.positions > 10
    (rejects,) = (root / "rejects").iterdir()
    assert json.loads(rejects.read_text())["reason"] == "image_unreadable"


def test_the_calibration_pass_reads_rows_with_images(tmp_path: Path, model: Path) -> None:
    config = _config(tmp_path, model, "transformers", "calibrated", calibration_targets=100)
    prepared = prepare(config)
    found = calibrate(config, load_for(config, prepared.header), prepared.header, prepared.units[0])
    assert found.id_ranks
    assert 0 < found.tail_mass < 1


def test_answers_to_prompts_with_images_are_captured(tmp_path: Path, model: Path) -> None:
    sampling = {"max_tokens": 8, "n": 2, "temperature": 0.7, "seed": 3}
    config = _config(tmp_path, model, "transformers", "answers", mode="generate", sampling=sampling)
    root = _captured(config, units=9)
    rows = _rows(root)
    assert {len(row.media) for row in rows} == {0, 1, 2, 3}
    for row in rows:
        assert row.targets.positions <= 8
        assert row.target_spans[0, 0] > max((medium.position for medium in row.media), default=0)


def test_rows_with_images_of_a_dataset_are_scored_again_with_their_images(tmp_path: Path, model: Path) -> None:
    plain = _captured(_config(tmp_path, model, "transformers", "plain"), units=9)
    config = _config(tmp_path, model, "transformers", "again")
    source = {"rows_of": str(plain), "images_in_row_bytes": 0}
    again = _captured(CaptureConfig.model_validate({**config.model_dump(), "source": source}), units=9)
    assert [*(again / "media").iterdir()] != []
    for found, wanted in zip(_rows(again), _rows(plain), strict=True):
        assert found.sample_id == wanted.sample_id
        assert [(one.position, one.sha256) for one in found.media] == [
            (one.position, one.sha256) for one in wanted.media
        ]
        np.testing.assert_array_equal(found.token_ids, wanted.token_ids)
        np.testing.assert_array_equal(found.targets.logprobs, wanted.targets.logprobs)


@pytest.mark.slow
def test_vllm_captures_what_transformers_captures_and_equal_bytes_after_an_interruption(
    tmp_path: Path, model: Path
) -> None:
    whole = _captured(_config(tmp_path, model, "vllm", "whole"), units=9)
    parts = _captured(_config(tmp_path, model, "vllm", "parts"), units=1)
    for folder in ("shards", "media", "rejects"):
        assert contents(whole, folder) == contents(parts, folder)
    reference = _captured(_config(tmp_path, model, "transformers", "reference"), units=9)
    assert contents(whole, "media") == contents(reference, "media")
    for one, other in zip(_rows(whole), _rows(reference), strict=True):
        assert (one.sample_id, one.media) == (other.sample_id, other.media)
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        ours, wanted = one.targets.by_probability(), other.targets.by_probability()
        np.testing.assert_allclose(ours.logprobs, wanted.logprobs, atol=2e-3)  # float16 in both shards
        np.testing.assert_allclose(ours.label_logprob, wanted.label_logprob, atol=2e-3)
