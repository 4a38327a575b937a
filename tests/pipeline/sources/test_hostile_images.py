"""A law of rows with images that anybody may have written: each becomes a sequence or a reject, never an exception."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

from coldstill.pipeline.errors import TemplateCannotMark
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.files import parse_row
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.rows import check_media, check_sequence
from tests.vision import idefics3_processor, image_bytes, vision_tokenizer

from .vision_templates import VISION_FAMILIES

PROCESSOR = idefics3_processor(vision_tokenizer())
GOOD = base64.b64encode(image_bytes(1)).decode()
_DEEP: Any = "x.png"
for _ in range(400):
    _DEEP = [_DEEP]
_VALUES: tuple[Any, ...] = (
    *(None, "", 0, 1.5, True, [], {}, [None], [[]], {"image": {}}, _DEEP, "x" * 5000, "\x00", "\ud83d", "😀"),
    *(
        "x.png",
        "../x.png",
        "/etc/passwd",
        "~/x.png",
        "//x/y",
        "\\\\x",
        ".",
        "..",
        "file:",
        "file://",
        "file:///",
        "C:\\x",
    ),
    *("http://", "http://a", "https://a:b/c", "http://[::1", "s3://", "s3:///", "s3://A B!/x", "gs://_/x", "az://a"),
    *("memory://", "memory:///x", "data:", "data:,", "data:;base64,", "data:image/png;base64,AAAA", f"data:,{GOOD}"),
    *(f"data:image/png;base64,{GOOD}", {"bytes": GOOD}, {"bytes": GOOD[:-8], "path": "x"}, {"path": "x.png"}),
    *({"url": {"url": {"url": "x"}}}, {"coldstill:bytes": GOOD}, {"coldstill:bytes": ""}, {"bytes": [1, 2, 3]}),
)
_TEXTS = (
    "what?",
    "",
    "<image>",
    "<image><image>",
    "\n<image>\nwhat?",
    "<fake_token_around_image>",
    "<end_of_utterance>",
)


def _part(rng: random.Random) -> Any:
    kind = rng.choice(["image", "image_url", "text", "video", None, 7])
    part: dict[str, Any] = {} if kind is None else {"type": kind}
    for key in rng.sample(["image", "image_url", "url", "path", "bytes", "base64", "text", "index"], rng.randrange(3)):
        part[key] = rng.choice(_TEXTS) if key == "text" else rng.choice(_VALUES)
    return rng.choice([part, part, part, rng.choice(_VALUES), rng.choice(_TEXTS)])


def _content(rng: random.Random) -> Any:
    return rng.choice([rng.choice(_TEXTS), [_part(rng) for _ in range(rng.randrange(4))], [{"type": "image"}, "what?"]])


def _columns(rng: random.Random) -> dict[str, Any]:
    roles = rng.choice([("user", "assistant"), ("system", "user", "assistant"), ("user", "tool", "assistant"), ("x",)])
    messages = [{"role": role, "content": _content(rng)} for role in roles]
    columns: dict[str, Any] = {"messages": messages} if rng.random() < 0.8 else {"text": rng.choice(_TEXTS)}
    for name in ("images", "image"):
        if rng.random() < 0.5:
            values = [rng.choice(_VALUES) for _ in range(rng.randrange(4))]
            columns[name] = rng.choice([values, rng.choice(_VALUES)])
    return columns


@pytest.mark.parametrize("template", [None, VISION_FAMILIES[1].template, VISION_FAMILIES[2].template])
@pytest.mark.parametrize("mode", ["score", "generate", "pretrain"])
def test_a_row_that_anybody_wrote_is_a_sequence_or_a_reject(template: str | None, mode: Any, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(image_bytes(2))
    processor = PROCESSOR
    if template is not None:
        processor = idefics3_processor(vision_tokenizer(template))
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), loss_on="all")
    maker = SequenceMaker(processor.tokenizer, source=source, max_length=512, processor=processor, mode=mode)
    tokens, placeholder = len(processor.tokenizer), processor.tokenizer.convert_tokens_to_ids("<image>")
    rng = random.Random(f"{mode} {template}")
    sequences = with_images = 0
    for number in range(300):
        row = parse_row(number, json.dumps(_columns(rng)).encode())
        try:
            made = maker.make(row)
        except TemplateCannotMark:
            continue
        if not isinstance(made, TokenSequence):
            assert str(tmp_path) not in made.detail
            assert "0x" not in made.detail
            assert len(made.detail) < 2000
            json.dumps(made.detail).encode()
            continue
        sequences += 1
        with_images += bool(made.media)
        check_media("a", made.media, tokens=made.token_ids.size)
        if mode == "score":
            check_sequence("a", made.token_ids, made.target_spans, token_count=tokens)
        at = [index for index, id_ in enumerate(made.token_ids) if id_ == placeholder]
        assert [item.position for item in made.media] == at
        assert b"iVBOR" not in json.dumps(dict(made.metadata)).encode()
    assert sequences
    assert with_images or mode == "pretrain"
