"""Laws of images in rows: every layout of the field gives the same sequence, and every misfit is rejected by name."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from coldstill.common.processor import ProcessorUnusable
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.files import SourceRow
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.commits import Reject
from tests import making, vision
from tests.vision import idefics3_processor, image_bytes, vision_tokenizer

PROCESSOR = idefics3_processor(vision_tokenizer())
RED, BLUE = image_bytes(1), image_bytes(2, format="JPEG")
WANTED = "<s>user:<image>and<image>differ?<end_of_utterance><s>assistant:yes<end_of_utterance>"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _uri(data: bytes) -> str:
    return f"data:image/png;base64,{_base64(data)}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "red.png").write_bytes(RED)
    (tmp_path / "images" / "blue.jpg").write_bytes(BLUE)
    return tmp_path


def _maker(folder: Path, *, mode: Any = "score", max_images: int = 4, **settings: Any) -> SequenceMaker:
    source = SourceConfig(path=str(folder / "rows.jsonl"), **settings)
    return SequenceMaker(
        PROCESSOR.tokenizer, source=source, max_length=512, processor=PROCESSOR, max_images=max_images, mode=mode
    )


def _make(folder: Path, columns: dict[str, Any], **settings: Any) -> TokenSequence | Reject:
    return _maker(folder, **settings).make(SourceRow(3, columns))


def _chat(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "yes"}]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _asking(first: Any, second: Any) -> list[dict[str, Any]]:
    return _chat(first, _text("and"), second, _text("differ?"))


IMAGE = {"type": "image"}
MARKED = "<image>\nand\n<image>\ndiffer?"
LAYOUTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "paths in parts": lambda _: {
        "messages": _asking({**IMAGE, "image": "images/red.png"}, {**IMAGE, "path": "images/blue.jpg"})
    },
    "absolute paths": lambda folder: {
        "messages": _asking(
            {**IMAGE, "url": str(folder / "images/red.png")}, {**IMAGE, "image": f"file://{folder}/images/blue.jpg"}
        )
    },
    "parts without a type": lambda _: {"messages": _asking({"image": "images/red.png"}, {"image": "images/blue.jpg"})},
    "OpenAI's parts": lambda _: {
        "messages": _asking(
            {"type": "image_url", "image_url": {"url": _uri(RED), "detail": "high"}},
            {"type": "image_url", "image_url": _uri(BLUE)},
        )
    },
    "Anthropic's parts": lambda _: {
        "messages": _asking(
            {**IMAGE, "source": {"type": "base64", "media_type": "image/png", "data": _base64(RED)}},
            {**IMAGE, "source": {"type": "url", "url": "images/blue.jpg"}},
        )
    },
    "bytes and base64": lambda _: {"messages": _asking({**IMAGE, "bytes": RED}, {**IMAGE, "base64": _base64(BLUE)})},
    "dicts of bytes and path": lambda _: {
        "messages": _asking(
            {**IMAGE, "image": {"bytes": RED, "path": "elsewhere.png"}},
            {**IMAGE, "image": {"bytes": None, "path": "images/blue.jpg"}},
        )
    },
    "a typed column's null fields": lambda _: {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "images/red.png", "text": None},
                    {"type": "text", "image": None, "text": "and"},
                    {"type": "image", "image": "images/blue.jpg", "text": None},
                    {"type": "text", "image": None, "text": "differ?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "image": None, "text": "yes"}]},
        ]
    },
    "a column beside parts": lambda _: {
        "messages": _asking(IMAGE, IMAGE),
        "images": [{"bytes": RED, "path": None}, {"path": "images/blue.jpg"}],
    },
    "a column beside parts with indices": lambda _: {
        "messages": _asking({**IMAGE, "index": 0, "text": None}, {**IMAGE, "index": 1, "text": None}),
        "images": [RED, BLUE],
    },
    "one part from the column": lambda _: {
        "messages": _asking({**IMAGE, "bytes": RED}, IMAGE),
        "image": "images/blue.jpg",
    },
    "marks": lambda _: {
        "messages": [{"role": "user", "content": MARKED}, {"role": "assistant", "content": "yes"}],
        "images": ["images/red.png", _uri(BLUE)],
    },
    "marks in text parts": lambda _: {"messages": _chat(_text(MARKED)), "images": [RED, BLUE]},
    "marks in bare texts": lambda _: {"messages": _chat(MARKED), "images": [RED, BLUE]},
    "LLaVA's conversations": lambda _: {
        "conversations": [{"from": "human", "value": MARKED}, {"from": "gpt", "value": "yes"}],
        "image": ["images/red.png", "images/blue.jpg"],
    },
    "prompt and response": lambda _: {"prompt": MARKED, "response": "yes", "images": [RED, BLUE]},
    "JSON text of messages": lambda _: {"messages": json.dumps(_asking(IMAGE, IMAGE)), "images": [RED, BLUE]},
    "base64 of a JSON export": lambda _: {
        "messages": _asking(IMAGE, IMAGE),
        "images": [{"bytes": _base64(RED), "path": "x.png"}, {"bytes": _base64(BLUE)}],
    },
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_layout_gives_the_same_tokens_and_the_sources_own_bytes(
    layout: Callable[[Path], dict[str, Any]], folder: Path
) -> None:
    made = _make(folder, {**layout(folder), "id": "one", "topic": "colors"})
    assert isinstance(made, TokenSequence), made
    assert PROCESSOR.tokenizer.decode(made.token_ids) == WANTED
    assert [item.data for item in made.media] == [RED, BLUE]
    assert [item.type for item in made.media] == ["image/png", "image/jpeg"]
    assert made.metadata == {"topic": "colors"}


def test_a_column_of_another_name_is_read_and_the_default_name_is_then_metadata(folder: Path) -> None:
    row = {"messages": _asking(IMAGE, IMAGE), "pictures": [RED, BLUE], "image": "a name"}
    made = _make(folder, row, images="pictures")
    assert isinstance(made, TokenSequence)
    assert made.metadata == {"image": "a name"}


def test_marks_in_any_turn_take_the_images_in_order(folder: Path) -> None:
    turns = ["<image>first", "one", "no image", "two", "third<image>", "three"]
    roles = ("user", "assistant") * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    made = _make(folder, {"messages": messages, "images": [RED, BLUE]})
    assert isinstance(made, TokenSequence)
    text = PROCESSOR.tokenizer.decode(made.token_ids)
    assert text.count("<image>") == 2
    assert text.index("<image>first") < text.index("third<image>")
    assert [item.data for item in made.media] == [RED, BLUE]


UNMARKED = "<s>user:<image><image>which?<end_of_utterance><s>assistant:A<end_of_utterance>"
UNMARKED += "<s>user:why?<end_of_utterance><s>assistant:B<end_of_utterance>"


@pytest.mark.parametrize(
    ("columns", "system"),
    [
        ({"texts": [{"user": "which?", "assistant": "A", "source": "s"}, {"user": "why?", "assistant": "B"}]}, False),
        (
            {
                "messages": [
                    {"role": "system", "content": "See."},
                    {"role": "user", "content": "which?"},
                    {"role": "assistant", "content": "A"},
                    {"role": "user", "content": [_text("why?")]},
                    {"role": "assistant", "content": "B"},
                ]
            },
            True,
        ),
        (
            {
                "prompt": [
                    {"role": "user", "content": [_text("which?")]},
                    {"role": "assistant", "content": "A"},
                    {"role": "user", "content": "why?"},
                ],
                "response": "B",
            },
            False,
        ),
    ],
    ids=["The Cauldron", "TRL", "parts of text"],
)
def test_images_that_nothing_places_come_before_the_first_question(
    columns: dict[str, Any], system: bool, folder: Path
) -> None:
    maker = _maker(folder)
    made = maker.make(SourceRow(3, {**columns, "images": [RED, BLUE]}))
    assert isinstance(made, TokenSequence), made
    start = "<s>system:See.<end_of_utterance>" if system else ""
    assert PROCESSOR.tokenizer.decode(made.token_ids) == start + UNMARKED
    assert [item.data for item in made.media] == [RED, BLUE]
    assert made.metadata == {}
    (layout,) = maker.layouts
    assert layout.endswith("images without marks -> before the first question")


def test_a_mark_without_an_image_is_rejected_though_it_is_not_the_teachers_placeholder(folder: Path) -> None:
    """A misnamed column would otherwise give a dataset whose teacher saw no image."""
    processor = idefics3_processor(vision_tokenizer())
    processor.image_token = "<fake_token_around_image>"
    source = SourceConfig(path=str(folder / "rows.jsonl"))
    maker = SequenceMaker(processor.tokenizer, source=source, max_length=512, processor=processor, max_images=4)
    made = maker.make(SourceRow(0, {"prompt": "<image>\nwhat?", "response": "yes", "picture": "images/red.png"}))
    assert isinstance(made, Reject)
    assert (made.reason, made.detail) == (
        "bad_images",
        "no column of images, which source.images names, for a mark <image>",
    )


@pytest.mark.parametrize("empty", [{}, {"images": None}, {"images": []}, {"image": ""}, {"image": {}}])
def test_a_row_of_text_stands_between_rows_with_images(folder: Path, empty: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    made = _make(folder, {"messages": messages, **empty})
    assert isinstance(made, TokenSequence)
    assert made.media == ()
    assert made.metadata == {}
    assert PROCESSOR.tokenizer.decode(made.token_ids) == (
        "<s>user:hi<end_of_utterance><s>assistant:yes<end_of_utterance>"
    )


def test_equal_images_of_a_row_have_equal_digests(folder: Path) -> None:
    made = _make(folder, {"messages": _asking({**IMAGE, "bytes": RED}, {**IMAGE, "image": "images/red.png"})})
    assert isinstance(made, TokenSequence)
    assert made.media[0].sha256 == made.media[1].sha256
    assert made.media[0].position < made.media[1].position


MISFITS: dict[str, tuple[dict[str, Any], str, str]] = {
    "fewer images than parts": (
        {"messages": _asking(IMAGE, IMAGE), "images": [RED]},
        "bad_images",
        "images in column 'images': 1; image parts without image, image_url, source, bytes, base64, data, url, path: 2",
    ),
    "more images than parts": (
        {"messages": _asking(IMAGE, {**IMAGE, "bytes": BLUE}), "images": [RED, RED]},
        "bad_images",
        "images in column 'images': 2; image parts without image, image_url, source, bytes, base64, data, url, path: 1",
    ),
    "a part without content": (
        {"messages": _chat(IMAGE, _text("what?"))},
        "bad_images",
        "no column of images; image parts without image, image_url, source, bytes, base64, data, url, path: 1",
    ),
    "fewer marks than images": (
        {"prompt": "<image> what?", "response": "yes", "images": [RED, BLUE]},
        "bad_images",
        "images in column 'images': 2; marks <image>: 1",
    ),
    "no question": (
        {"messages": [{"role": "assistant", "content": "yes"}], "image": RED},
        "bad_images",
        "images in column 'image': 1; marks <image>: 0",
    ),
    "a mark without a column": (
        {"prompt": "<image> what?", "response": "yes"},
        "bad_images",
        "no column of images, which source.images names, for a mark <image>",
    ),
    "a mark in an answer": (
        {"prompt": "what tag?", "response": "<image>"},
        "placeholders_differ",
        "a text holds <image>, which the teacher reads as part of an image",
    ),
    "an index out of order": (
        {"messages": _asking({**IMAGE, "index": 1}, {**IMAGE, "index": 0}), "images": [RED, BLUE]},
        "bad_images",
        "image part 0 of message 0 has the index 1, and stands for image 0 of its column",
    ),
    "an empty image": (
        {"messages": _asking(IMAGE, IMAGE), "images": [RED, None]},
        "bad_images",
        "image 1 of column 'images' is empty",
    ),
    "a number": (
        {"messages": _chat(IMAGE, _text("what?")), "images": [7]},
        "bad_images",
        "image 0 of column 'images' is of type int, neither a place nor bytes",
    ),
    "bad base64": (
        {"messages": _chat({**IMAGE, "base64": "@@@"}, _text("what?"))},
        "bad_images",
        "image part 0 of message 0 is not base64: Only base64 data is allowed",
    ),
    "a data URI with bad base64": (
        {"messages": _chat({**IMAGE, "image": "data:image/png;base64,abc"}, _text("what?"))},
        "bad_images",
        "image part 0 of message 0 is not base64: Incorrect padding",
    ),
    "a data URI without data": (
        {"messages": _chat({**IMAGE, "image": "data:image/png;base64"}, _text("what?"))},
        "bad_images",
        "image part 0 of message 0 is a data URI without a comma",
    ),
    "a video": (
        {"messages": _chat({"type": "video", "video": "x.mp4"}, _text("what?"))},
        "bad_messages",
        "part 0 of message 0 is of type video: only text and images are captured",
    ),
    "too many": (
        {"messages": _chat(*[{**IMAGE, "bytes": RED}] * 5, _text("what?"))},
        "too_many_images",
        "5 images, at most 4",
    ),
    "plain text with images": ({"text": "what?", "images": [RED]}, "bad_images", "images are captured in chats only"),
}


@pytest.mark.parametrize(("columns", "reason", "detail"), MISFITS.values(), ids=list(MISFITS))
def test_every_misfit_is_rejected_by_name(columns: dict[str, Any], reason: str, detail: str, folder: Path) -> None:
    made = _make(folder, columns)
    assert isinstance(made, Reject)
    assert (made.reason, made.detail) == (reason, detail)


def test_images_of_documents_are_rejected(folder: Path) -> None:
    made = _make(folder, {"text": "what?", "image": RED}, mode="pretrain")
    assert isinstance(made, Reject)
    assert (made.reason, made.detail) == ("bad_images", "images are captured in chats only")


def test_a_row_that_is_too_long_is_rejected_before_its_images_are_read(folder: Path) -> None:
    made = _make(folder, {"messages": _chat({**IMAGE, "image": "absent.png"}, _text("what?" * 200))})
    assert isinstance(made, Reject)
    assert made.reason == "over_long"


def test_hostile_nesting_of_an_image_is_rejected(folder: Path) -> None:
    image: Any = "images/red.png"
    for _ in range(900):
        image = {"image": image}
    made = _make(folder, {"messages": _chat(IMAGE, _text("what?")), "images": [image]})
    assert isinstance(made, Reject)
    assert made.reason == "bad_images"


def test_a_text_teacher_refuses_marks_beside_images_and_keeps_marks_without(tmp_path: Path) -> None:
    making.chat_model(tmp_path)
    maker = SequenceMaker(AutoTokenizer.from_pretrained(tmp_path), source=SourceConfig(path="rows"), max_length=256)
    messages = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Red."}]
    refused = maker.make(SourceRow(0, {"messages": messages, "image": "a.png"}))
    assert isinstance(refused, Reject)
    assert (refused.reason, refused.detail) == ("bad_images", "the row has images, and the teacher reads text only")
    assert isinstance(maker.make(SourceRow(0, {"messages": messages, "image": None})), TokenSequence)


def test_a_processor_that_cannot_be_loaded_stops_rows_with_images_only(tmp_path: Path) -> None:
    """A text capture by a model that also sees images needs no processor."""
    vision.idefics3_model(tmp_path / "teacher")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / "teacher" / name).unlink(missing_ok=True)
    document = {"output": "o", "source": {"path": "rows"}, "teacher": {"model": str(tmp_path / "teacher")}}
    maker = SequenceMaker.of(CaptureConfig.model_validate(document))
    assert maker.processor is None
    answer = {"role": "assistant", "content": "Red."}
    text = {"role": "user", "content": [{"type": "text", "text": "What?"}]}
    assert isinstance(maker.make(SourceRow(0, {"messages": [text, answer]})), TokenSequence)
    image = {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]}
    with pytest.raises(ProcessorUnusable, match="teacher"):
        maker.make(SourceRow(1, {"messages": [image, answer]}))
