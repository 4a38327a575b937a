"""Laws of captures with images, before a teacher runs: the header's facts, first rows, estimates and limits."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor

from coldstill.common.images import decoded
from coldstill.common.processor import ImageExpander, ProcessorUnusable, processor_settings, processor_sha256
from coldstill.pipeline import image_counts
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.dry_run import _with_probe, count_source, dry_run
from coldstill.pipeline.errors import AllRowsRejected, TemplateDrops
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.sources.source import open_source
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.pipeline.worker import load_for, measure_speed
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader
from tests import making
from tests.pipeline.capturing import capture_config
from tests.vision import CHAT_TEMPLATE, idefics3_model, image_bytes, llava_model

ROWS = 12


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "idefics3": idefics3_model(folder / "idefics3", splits=True, layers=1),
        "llava": llava_model(folder / "llava"),
    }


def _row(number: int) -> dict[str, Any]:
    """Three of four rows have images; image 0 is in many of them."""
    seeds = [0, number][: number % 4]
    images = [f"data:image/png;base64,{base64.b64encode(image_bytes(seed)).decode()}" for seed in seeds]
    return {
        "id": f"row {number}",
        "messages": [
            {"role": "user", "content": "<image>" * len(images) + "what?"},
            {"role": "assistant", "content": "a cat"},
        ],
        "images": images,
    }


def _config(folder: Path, teacher: Path, rows: list[Any] | None = None, **changes: Any) -> CaptureConfig:
    path = making.write_jsonl(folder / "rows.jsonl", rows or [_row(number) for number in range(ROWS)])
    making_teacher = {"model": str(teacher), **changes.pop("teacher", {})}
    source = {"path": str(path), **changes.pop("source", {})}
    (folder / "teacher").mkdir(exist_ok=True)
    return capture_config(folder, teacher=making_teacher, source=source, **changes)


def test_the_header_states_the_processor_and_where_images_are_stored(teachers: dict[str, Path], tmp_path: Path) -> None:
    header = prepare(_config(tmp_path, teachers["idefics3"], source={"images_in_row_bytes": 99})).header
    processor = AutoProcessor.from_pretrained(teachers["idefics3"])
    assert header.about.processor is not None
    assert header.about.processor.name == "Idefics3Processor"
    assert header.about.processor.settings_sha256 == processor_sha256(processor)
    assert header.about.processor.settings == json.loads(json.dumps(processor_settings(processor)))
    assert header.about.media_in_row_bytes == 99
    assert header.about.max_images == 8
    assert header.vocab_size == len(processor.tokenizer)


def test_the_header_of_a_teacher_of_text_states_nothing_of_images(tmp_path: Path) -> None:
    header = prepare(capture_config(tmp_path)).header
    assert b"media" not in header.to_bytes()
    assert b"processor" not in header.to_bytes()
    assert b"max_images" not in header.to_bytes()


def test_a_source_of_text_is_captured_by_a_teacher_that_sees(teachers: dict[str, Path], tmp_path: Path) -> None:
    config = _config(tmp_path, teachers["llava"], rows=making.chat_rows(4))
    prepared = prepare(config)
    assert prepared.header.about.processor is not None
    made = list(SequenceMaker.of(config).sequences(open_source(config.source).rows()))
    assert len(made) == 4
    assert all(isinstance(each, TokenSequence) and each.media == () for each in made)


def test_a_dataset_that_an_earlier_release_started_stays_one_of_text(teachers: dict[str, Path], tmp_path: Path) -> None:
    shown = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what?"}]
    chat = [{"role": "user", "content": shown}, {"role": "assistant", "content": "a cat"}]
    config = _config(tmp_path, teachers["llava"], rows=[*making.chat_rows(2), {"messages": chat}])
    prepared = prepare(config)
    earlier = json.loads(prepared.store.read(HEADER_NAME))
    for name in ("processor", "media_in_row_bytes", "max_images"):
        del earlier["about"][name]
    prepared.store.put(HEADER_NAME, json.dumps(earlier).encode())
    header = prepare(config).header
    assert header.about.processor is None
    made = list(SequenceMaker.of(config, header=header).sequences(open_source(config.source).rows()))
    assert [each.reason for each in made if isinstance(each, Reject)] == ["bad_messages"]
    assert len(made) == 3


def test_a_teacher_that_sees_needs_its_processor(teachers: dict[str, Path], tmp_path: Path) -> None:
    teacher = tmp_path / "without"
    teacher.mkdir()
    for path in teachers["llava"].iterdir():
        if "processor" not in path.name:
            (teacher / path.name).symlink_to(path)
    with pytest.raises(ProcessorUnusable, match="save"):
        prepare(_config(tmp_path, teacher))


def test_first_rows_whose_images_are_absent_end_the_start_with_the_reason(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{**_row(2), "images": ["absent/1.png", "absent/2.png"]}] * 3
    with pytest.raises(AllRowsRejected, match=r"3 image_not_found.*'absent/1\.png': No such file"):
        prepare(_config(tmp_path, teachers["llava"], rows=rows))


def test_a_template_that_drops_images_offers_no_setting_that_accepts_it(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    template = tmp_path / "deaf.jinja"
    template.write_text(CHAT_TEMPLATE.replace("<image>", ""))
    with pytest.raises(TemplateDrops, match="loses images") as caught:
        prepare(_config(tmp_path, teachers["llava"], rows=[_row(2)] * 3, source={"chat_template": str(template)}))
    assert "may_drop" not in caught.value.fix


@pytest.mark.parametrize("name", ["idefics3", "llava"])
def test_a_dry_run_counts_images_files_bytes_and_the_tokens_that_the_teacher_reads(
    name: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    size = len(image_bytes(0))
    sizes = [len(image_bytes(seed)) for number in range(ROWS) for seed in [0, number][: number % 4]]
    config = _config(tmp_path, teachers[name], source={"images_in_row_bytes": size})
    dry = dry_run(config, progress=False)
    found = dry.images
    assert found is not None
    assert (found.rows_with_images, found.images) == (ROWS * 3 // 4, len(sizes))
    assert found.image_bytes_in_rows == sum(each for each in sizes if each <= size)
    large = {image_bytes(n) for n in range(ROWS) if n % 4 > 1 and len(image_bytes(n)) > size}
    assert (found.media_files, found.media_bytes) == (len(large), sum(map(len, large)))
    assert found.warning is None
    # As long as all images are among the first ones, the count is exact.
    expander, tokens = ImageExpander(AutoProcessor.from_pretrained(teachers[name])), 0
    for made in SequenceMaker.of(config).sequences(open_source(config.source).rows()):
        assert isinstance(made, TokenSequence)
        images = [decoded(item.data or b"", where="") for item in made.media]
        at = [np.array([item.position for item in made.media], np.int64)]
        tokens += expander.expand([made.token_ids], positions=at, images=[images])[0][0].token_ids.size
    assert found.tokens_with_images == tokens > dry.tokens
    assert dry.lines()["media_files"] == found.media_files
    assert "warning" not in dry.lines()


def test_a_dry_run_warns_of_more_files_than_a_manifest_lists(
    teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_counts, "MAX_MEDIA_FILES", 4)
    config = _config(tmp_path, teachers["llava"], source={"images_in_row_bytes": 0})
    assert "source.images_in_row_bytes" in str(dry_run(config, progress=False).lines()["warning"])


def test_a_dry_run_warns_of_rows_that_are_too_long_with_their_images(teachers: dict[str, Path], tmp_path: Path) -> None:
    """Their stored tokens fit, so that nothing but an expansion shows it."""
    config = _config(tmp_path, teachers["llava"])
    lengths = []
    for made in SequenceMaker.of(config).sequences(open_source(config.source).rows()):
        assert isinstance(made, TokenSequence)
        lengths.append(made.token_ids.size + 15 * len(made.media))  # each becomes 16 tokens
    limit = max(lengths) - 1
    teacher = config.teacher.model_copy(update={"max_length": limit})
    warning = dry_run(config.model_copy(update={"teacher": teacher}), progress=False).lines()["warning"]
    over = [length for length in lengths if length > limit]
    start = f"the capture rejects {len(over)} of the first {ROWS * 3 // 4} rows with images too, such as row "
    assert str(warning).startswith(start)
    assert f": over_long: {over[0]} tokens, " in str(warning)
    assert str(warning).endswith(f"at most {limit}")


def test_the_bytes_of_a_probe_are_those_of_values_and_of_the_images_in_rows(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    """Images in files are no bytes of shards, whatever the probe has seen of them."""
    sizes = {}
    for in_row_bytes in (0, 1 << 18):
        config = _config(tmp_path, teachers["llava"], source={"images_in_row_bytes": in_row_bytes})
        output = str(tmp_path / f"o{in_row_bytes}")
        config = config.model_copy(update={"output": output, "calibration_targets": 0})
        prepared = prepare(config)
        header = DatasetHeader.from_bytes(prepared.store.read(HEADER_NAME), where=HEADER_NAME)
        source, maker = open_source(config.source), SequenceMaker.of(config)
        units = source.plan(config.rows_per_unit)
        sequences = [made for made in maker.sequences(source.rows()) if isinstance(made, TokenSequence)]
        report = measure_speed(load_for(config, header), header, sequences, seconds=60)
        counts = count_source(config, units=units, source=source, maker=maker, progress=False)
        dry = _with_probe(config, counts, shards=1, bytes_most=0, report=report, gpus=0.0)
        assert dry.images is not None
        sizes[in_row_bytes] = (dry.bytes_to, dry.images.image_bytes_in_rows)
    assert sizes[0][1] == 0 < sizes[1 << 18][1]
    assert sizes[1 << 18][0] - sizes[0][0] == pytest.approx(sizes[1 << 18][1], rel=0.05)


def test_a_dry_run_of_a_teacher_of_text_has_no_line_of_images(tmp_path: Path) -> None:
    dry = dry_run(capture_config(tmp_path), progress=False)
    assert dry.images is None
    assert not [name for name in dry.lines() if "image" in name or "media" in name]
