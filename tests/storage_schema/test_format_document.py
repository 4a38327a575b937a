"""FORMAT.md describes what the code does: its worked example and its bounds are those of the code."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
import zstandard

import coldstill.storage_schema
from coldstill.common.images import ENDINGS, MAX_IMAGE_PIXELS
from coldstill.common.processor import expanded_positions
from coldstill.storage_schema.codec import MAX_ENTRIES, STREAMS, RowCodec
from coldstill.storage_schema.header import (
    MAX_DRAWS,
    MAX_ID_RANKS,
    MAX_TOKENS,
    MAX_TOP_K,
    MAX_VOCAB_SIZE,
    Codec,
    DatasetHeader,
)
from coldstill.storage_schema.header_facts import About, ProcessorFacts
from coldstill.storage_schema.header_format_1 import FIELDS
from coldstill.storage_schema.media import MAX_IN_ROW_BYTES, MAX_MEDIA_FILES
from coldstill.storage_schema.rows import MAX_MEDIA, MAX_MEDIA_BYTES, TeacherTargets, is_media_path
from coldstill.storage_schema.shard import MAX_SHARD_BYTES, SCHEMA
from coldstill.storage_schema.shard.layout import MAX_GROUP_BYTES, MAX_GROUP_ROWS, MAX_ROW_BYTES
from tests import making

DOCUMENT = (Path(coldstill.storage_schema.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")


def _example_header(tokenizer: Path) -> DatasetHeader:
    codec = Codec(name="grid", a=166, b=8, fidelity="fine", mean_kl=1e-5)
    return making.tiny_header(tokenizer, top_k=3, draws=4, vocab_size=50_257, token_count=50_257, codec=codec)


def _example_frames(tokenizer: Path) -> dict[str, bytes]:
    logs = np.log([[0.5, 0.25, 0.125], [0.9375, 1e-99, 1e-99]])
    logs[1, 1:] = -np.inf
    targets = TeacherTargets(
        ids=np.array([[300, 7, 5], [2, 2, 2]], np.int32),
        logprobs=logs.astype(np.float32),
        counts=np.array([3, 1], np.int32),
        log_tail=np.log([0.125, 0.0625]).astype(np.float32),
        label_logprob=np.array([np.log(0.5), -5.0], np.float32),
        draw_ids=np.array([40_000, 11, 11], np.int32),
        draw_counts=np.array([3, 0], np.int32),
    )
    return RowCodec(_example_header(tokenizer)).encode(targets, labels=np.array([300, 9], np.int32))


def test_the_worked_example_is_what_the_encoder_writes(tokenizer_folder: Path) -> None:
    block = DOCUMENT.split("in hex:")[1].split("```")[1]
    written = dict(re.fullmatch(r"(\w+) *(.*)", line).groups() for line in block.strip().splitlines())  # type: ignore[union-attr]
    frames = _example_frames(tokenizer_folder)
    assert tuple(written) == STREAMS
    found = {name: zstandard.decompress(frame).hex(" ") if frame else "" for name, frame in frames.items()}
    assert found == written


def test_the_frame_of_the_example_reads_as_described(tokenizer_folder: Path) -> None:
    frame = bytes.fromhex(re.search(r"The frame of `counts`\s+is `([0-9a-f ]+)`", DOCUMENT).group(1))  # type: ignore[union-attr]
    assert zstandard.decompress(frame) == bytes([3, 1])
    decoded = RowCodec(_example_header(tokenizer_folder)).decode(
        {**_example_frames(tokenizer_folder), "counts": frame}, labels=np.array([300, 9], np.int32)
    )
    assert decoded.counts.tolist() == [3, 1]


def test_every_column_is_in_the_document() -> None:
    assert [name for name in SCHEMA.names if f"`{name}`" not in DOCUMENT] == []


def test_every_field_of_format_2_and_each_of_its_values_are_in_the_document() -> None:
    names = set(DatasetHeader.model_fields) - set(FIELDS) | {"about", "adapter", "engine_args", "license", "licence"}
    values = [get_args(DatasetHeader.model_fields[name].annotation) for name in names & set(DatasetHeader.model_fields)]
    names |= {value for choices in values for value in choices if isinstance(value, str)}
    assert {"draw_method", "systematic", "top_k_and_named"} <= names
    assert [name for name in sorted(names) if f"`{name}`" not in DOCUMENT] == []


def test_the_bounds_are_the_code_s() -> None:
    assert (MAX_TOP_K, MAX_VOCAB_SIZE, MAX_TOKENS, MAX_DRAWS) == (4096, 1 << 20, 1 << 20, 1024)
    assert (MAX_ID_RANKS, MAX_ENTRIES) == (65_536, 1 << 24)
    assert (MAX_SHARD_BYTES, MAX_GROUP_ROWS, MAX_GROUP_BYTES, MAX_ROW_BYTES) == (500_000_000, 1024, 8 << 20, 256 << 20)
    for bound in ("4,096", "2^20", "1,024", "65,536", "2^24", "500 MB", "8 MiB", "256 MiB"):
        assert bound in DOCUMENT


def test_the_section_on_images_tells_the_bounds_and_names_of_the_code() -> None:
    section = DOCUMENT.split("## Images")[1].split("\n## ")[0]
    assert set(re.findall(r"`(image/\w+)`", section)) == set(ENDINGS)
    assert f"{MAX_IN_ROW_BYTES >> 20} MiB" in section
    assert f"{MAX_MEDIA_FILES:,}" in section
    assert 1 << int(re.findall(r"more than 2\^(\d+) pixels", section)[0]) == MAX_IMAGE_PIXELS
    assert f"{MAX_MEDIA:,}, each of at most {MAX_MEDIA_BYTES >> 20} MiB" in DOCUMENT
    for name in ("con", "prn", "aux", "nul", "com0", "com9", "lpt0", "lpt9"):
        assert f"`{name}`" in section
        assert not is_media_path(f"media/{name.upper()}.png")
    for field in re.findall(r"`processor\.(\w+)", section):
        assert field in ProcessorFacts.model_fields
    assert "media_in_row_bytes" in About.model_fields


def test_the_example_of_an_expansion_is_what_the_code_computes() -> None:
    text = " ".join(DOCUMENT.split())
    found = re.search(r"placeholders at (.+?) that become (\d) tokens and (\d), positions (.+?) are at (.+?)\.", text)
    assert found
    images, positions, wanted = ([int(number) for number in re.findall(r"\d+", part)] for part in found.group(1, 4, 5))
    lengths = np.array([int(found[2]), int(found[3])])
    expanded = expanded_positions(np.array(positions), images=np.array(images), lengths=lengths)
    assert expanded.tolist() == wanted
    pairs = list(zip(images, lengths.tolist(), strict=True))
    assert [t + sum(length - 1 for p, length in pairs if p <= t) for t in positions] == wanted


@pytest.mark.parametrize("fidelity", ["fine", "coarse", "exact"])
def test_a_label_may_exceed_the_tail_by_the_two_steps_of_the_document(
    tokenizer_folder: Path, fidelity: Literal["fine", "coarse", "exact"]
) -> None:
    """A reader with a smaller bound would refuse rows that a capture writes."""
    for formula in ("`2^-10 (1 + x)`", "`1 / ((a / 2) exp(-x / 2) + b)`"):
        assert formula in DOCUMENT
    codec = Codec.preset(fidelity, top_k=8)
    for x in (0.001, 0.5, 3.0, 60.0):
        of_float16 = 2.0**-10 * (1 + x)
        second = of_float16
        if codec.a is not None and codec.b is not None:
            second = 1 / ((codec.a / 2) * math.exp(-x / 2) + codec.b)
        found = RowCodec(making.tiny_header(tokenizer_folder, codec=codec)).label_slack(np.array([-x]))
        assert found == pytest.approx([of_float16 + second])
