"""Laws of the whole way of images: a capture, on Ray too, its dataset, and students of two families trained from it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from coldstill.common.images import decoded
from coldstill.pipeline.capture import capture
from coldstill.pipeline.cluster import pool
from coldstill.pipeline.config import CaptureConfig
from coldstill.storage_schema.commits import committed_units
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.store import Store
from coldstill.tools.verify import verify
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.train import train
from tests import making, vision
from tests.pipeline.capturing import OneWorkerPool, contents, write_config

SMALL, LARGE = 1 << 12, 1 << 16
"""Bytes: images of 12 x 8 pixels are below the first, those of 200 x 160 above it."""


def vision_rows(folder: Path, count: int) -> list[object]:
    """Chats about 0 to 3 images, some of which several rows show."""
    (folder / "images").mkdir(exist_ok=True)
    for number in range(7):
        size = (200, 160) if number % 2 else (12, 8)
        (folder / f"images/{number}.png").write_bytes(vision.image_bytes(number, size=size))
    rows: list[object] = []
    for number in range(count):
        shown = [f"images/{(number + place) % 7}.png" for place in range(number % 4)]
        question = [{"type": "image"} for _ in shown] + [{"type": "text", "text": f"Question {number}?"}]
        if len(shown) == 3:  # between and after the text too
            question = [question[0], question[3], *question[1:3]]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"It is {number}." + " Yes." * (number % 5)},
        ]
        rows.append({"id": f"row-{number}", "kind": number % 4, "messages": messages, "images": shown})
    return rows


def vision_config(folder: Path, *, rows: int = 24, output: str = "dataset", **changes: Any) -> CaptureConfig:
    """A capture of such chats by a tiny Idefics3 with tiles."""
    if not (folder / "teacher").exists():
        vision.idefics3_model(folder / "teacher", splits=True)
        making.write_jsonl(folder / "rows.jsonl", vision_rows(folder, rows))
    document: dict[str, Any] = {
        "output": str(folder / output),
        "source": {"path": str(folder / "rows.jsonl"), "images_in_row_bytes": SMALL},
        "teacher": {"model": str(folder / "teacher"), "top_k": 12, "draws": 8, "max_length": 256},
        "rows_per_unit": 4,
        "cluster": {"cpus_per_worker": 0.5},
    }
    for name, value in changes.items():
        document[name] = {**document.get(name, {}), **value} if isinstance(value, dict) else value
    return CaptureConfig.model_validate(document)


def started(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "coldstill", "capture", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out


def require_whole(root: Path, source: Path) -> None:
    """Every row has its own images in their order, byte for byte, at placeholders; each large image is one file."""
    assert verify(root, deep=True, progress=False) == []
    dataset = open_dataset(root)
    placeholder = dataset.header.about.processor.settings["image_token_id"]
    by_id = {row["id"]: row for row in vision_rows(source, len(dataset))}
    for row in dataset.rows():
        wanted = [(source / name).read_bytes() for name in by_id[row.sample_id]["images"]]
        assert [dataset.media_content(item) for item in row.media] == wanted
        assert [item.position for item in row.media] == np.flatnonzero(row.token_ids == placeholder).tolist()
        assert [item.data is not None for item in row.media] == [len(data) <= SMALL for data in wanted]
        assert set(row.metadata) == {"kind"}
    files = sorted((root / "media").iterdir())
    assert len(files) == 3  # images 1, 3 and 5


@pytest.mark.slow
def test_a_capture_by_vllm_on_ray_that_is_killed_equals_an_unbroken_one_and_the_reference(tmp_path: Path) -> None:
    unbroken = write_config(tmp_path / "unbroken.yaml", vision_config(tmp_path, output="unbroken"))
    finished(started(unbroken))
    config = vision_config(tmp_path)
    path = write_config(tmp_path / "capture.yaml", config)
    process = started(path)
    while len(committed_units(Store(config.output))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(committed_units(Store(config.output))) < 6, "the kill came too late to prove anything"
    finished(started(path))
    assert contents(config.output) == contents(tmp_path / "unbroken")
    assert open_dataset(config.output).dataset_id == open_dataset(tmp_path / "unbroken").dataset_id
    require_whole(tmp_path / "dataset", tmp_path)

    reference = vision_config(tmp_path, output="reference", teacher={"engine": "transformers"})
    finished(started(write_config(tmp_path / "reference.yaml", reference)))
    require_whole(tmp_path / "reference", tmp_path)
    rows = zip(open_dataset(config.output).rows(), open_dataset(reference.output).rows(), strict=True)
    for ours, theirs in rows:
        assert np.array_equal(ours.token_ids, theirs.token_ids)
        assert np.array_equal(ours.target_spans, theirs.target_spans)
        assert np.abs(ours.targets.label_logprob - theirs.targets.label_logprob).max() < 2e-2  # steps of the grid


def test_students_of_two_families_train_from_one_capture_and_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one expands an image to another number of tokens than the teacher."""
    monkeypatch.setattr(pool, "WorkerPool", OneWorkerPool)
    config = vision_config(tmp_path, teacher={"engine": "transformers"})
    capture(config)
    require_whole(tmp_path / "dataset", tmp_path)
    Path(tmp_path / "teacher").rename(tmp_path / "away")
    for name, make in (("idefics3", vision.idefics3_model), ("llava", vision.llava_model)):
        make(tmp_path / name, seed=3)
        settings = TrainConfig.model_validate(
            {
                "dataset": config.output,
                "output": str(tmp_path / f"{name} run"),
                "student": {"model": str(tmp_path / name), "freeze": ["vision_tower"]},
                "loss": {"name": "taid"},
                "training": {"learning_rate": 3e-3, "batch_size": 4, "epochs": 4, "dataloader_workers": 2},
            }
        )
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings.model_dump()))
        summary = train(settings)
        assert summary.steps == 24
        student = Path(settings.output, "student")
        model, processor = AutoModelForImageTextToText.from_pretrained(student), AutoProcessor.from_pretrained(student)
        before = AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict()
        moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert moved
        assert not any("vision" in key for key in moved)
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Question 1?"}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        shown = decoded((tmp_path / "images/1.png").read_bytes(), where="i")
        assert isinstance(shown, Image.Image)
        inputs = processor(text=[text], images=[[shown]], return_tensors="pt", add_special_tokens=False)
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert answer.shape[1] > inputs["input_ids"].shape[1]
