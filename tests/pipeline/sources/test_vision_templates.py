"""Laws of chat templates of vision-language families: one placeholder per image, and the family's own rendering."""

from __future__ import annotations

from typing import Any

import pytest

from coldstill.common.images import decoded
from coldstill.common.processor import ImageExpander, placeholder_id
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.files import SourceRow
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.rows import span_positions
from tests.vision import CHAT_TEMPLATE, idefics3_processor, image_bytes, llava_processor, vision_tokenizer

from .vision_templates import VISION_FAMILIES, VisionFamily, processor_of

_FAMILIES = pytest.mark.parametrize("family", VISION_FAMILIES, ids=[family.name for family in VISION_FAMILIES])
Turns = list[tuple[str, list[str] | str]]
"""Messages as role and content; in a list, "*" stands for an image."""

CHATS: dict[str, Turns] = {
    "one image": [("user", ["*", "what is it?"]), ("assistant", "a cat")],
    "an image after its question": [("user", ["what is it?", "*"]), ("assistant", ["a cat"])],
    "two images in a turn": [("user", ["*", "*", "compare them"]), ("assistant", "same")],
    "images in several turns": [
        ("user", ["first", "*", "second", "*"]),
        ("assistant", "same"),
        ("user", "and now?"),
        ("assistant", "no"),
        ("user", ["*", "this?"]),
        ("assistant", ["yes"]),
    ],
    "no image": [("user", "hi"), ("assistant", "hello")],
    "a system prompt": [("system", "be kind"), ("user", ["*", "what is it?"]), ("assistant", "a cat")],
    "a system prompt in parts": [("system", ["be kind"]), ("user", ["*", "what?"]), ("assistant", ["a cat"])],
}


def _row(turns: Turns) -> dict[str, Any]:
    seeds = iter(range(99))

    def part(text: str) -> dict[str, Any]:
        if text == "*":
            return {"type": "image", "bytes": image_bytes(next(seeds), size=(8, 8))}
        return {"type": "text", "text": text}

    messages = [
        {"role": role, "content": content if isinstance(content, str) else [part(text) for text in content]}
        for role, content in turns
    ]
    return {"messages": messages}


def _rendered(processor: Any, turns: Turns, **options: Any) -> str:
    """As the family's users render it: each content as parts."""
    messages = [
        {
            "role": role,
            "content": [
                {"type": "image"} if text == "*" else {"type": "text", "text": text}
                for text in ([content] if isinstance(content, str) else content)
            ],
        }
        for role, content in turns
    ]
    return str(processor.apply_chat_template(messages, tokenize=False, **options))


def _maker(processor: Any, *, mode: Any = "score", **settings: Any) -> SequenceMaker:
    source = SourceConfig(path="x.jsonl", **settings)
    return SequenceMaker(processor.tokenizer, source=source, max_length=4096, processor=processor, mode=mode)


def _made(processor: Any, turns: Turns, **settings: Any) -> TokenSequence:
    made = _maker(processor, **settings).make(SourceRow(0, _row(turns)))
    assert isinstance(made, TokenSequence), made
    return made


@_FAMILIES
@pytest.mark.parametrize("turns", CHATS.values(), ids=list(CHATS))
def test_the_tokens_are_those_of_the_processors_own_rendering_with_a_medium_at_each_placeholder(
    family: VisionFamily, turns: Turns
) -> None:
    processor = processor_of(family)
    made = _made(processor, turns)
    text = _rendered(processor, turns)
    assert made.token_ids.tolist() == processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    images = sum(content.count("*") for _, content in turns if isinstance(content, list))
    positions = [index for index, id_ in enumerate(made.token_ids) if id_ == placeholder_id(processor)]
    assert [item.position for item in made.media] == positions
    assert len(positions) == images
    assert [item.data for item in made.media] == [image_bytes(seed, size=(8, 8)) for seed in range(images)]
    answers = [made.token_ids[start + 1 : stop + 1] for start, stop in made.target_spans]
    shown = [processor.tokenizer.decode(ids).removesuffix(family.end).strip() for ids in answers]
    wanted = ["".join(content) for role, content in turns if role == "assistant"]
    assert shown == wanted


@_FAMILIES
def test_a_prompt_is_the_processors_rendering_with_the_start_of_an_answer(family: VisionFamily) -> None:
    processor, turns = processor_of(family), CHATS["images in several turns"]
    made = _made(processor, turns, mode="generate")
    text = _rendered(processor, turns[:-1], add_generation_prompt=True)
    assert made.token_ids.tolist() == processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(made.media) == 3
    assert not len(made.target_spans)


@_FAMILIES
def test_no_placeholder_is_a_target_even_if_all_tokens_are(family: VisionFamily) -> None:
    processor = processor_of(family)
    made = _made(processor, CHATS["images in several turns"], loss_on="all")
    labels = span_positions(made.target_spans) + 1
    wanted = [j for j in range(1, made.token_ids.size) if made.token_ids[j] != placeholder_id(processor)]
    assert labels.tolist() == wanted


@_FAMILIES
def test_the_parts_of_a_row_that_is_split_have_their_own_images(family: VisionFamily) -> None:
    processor = processor_of(family)
    source = SourceConfig(path="x.jsonl", over_long="split", loss_on="all")
    whole = _made(processor, CHATS["images in several turns"], loss_on="all")
    maker = SequenceMaker(processor.tokenizer, source=source, max_length=9, processor=processor)
    row = SourceRow(0, _row(CHATS["images in several turns"]))
    parts = [made for made in maker.sequences([row]) if isinstance(made, TokenSequence)]
    for part in parts:
        start = int(part.sample_id.partition("~")[2]) * 9
        assert part.token_ids.tolist() == whole.token_ids[start : start + 9].tolist()
        inside = [item for item in whole.media if start <= item.position < start + 9]
        assert [(item.position + start, item.sha256) for item in part.media] == [
            (item.position, item.sha256) for item in inside
        ]
    assert sum(len(part.media) for part in parts) == 3


@_FAMILIES
def test_a_text_that_holds_the_placeholder_is_rejected_with_and_without_images(family: VisionFamily) -> None:
    processor = processor_of(family)
    held = ("placeholders_differ", f"a text holds {family.placeholder}, which the teacher reads as part of an image")
    lost = ("bad_images", "no column of images, which source.images names, for a mark <image>")
    for turns, wanted in (
        (
            [("user", f"what is {family.placeholder}?"), ("assistant", "a token")],
            lost if family.placeholder == "<image>" else held,
        ),
        ([("user", ["*", "what?"]), ("assistant", f"a {family.placeholder}")], held),
    ):
        made = _maker(processor).make(SourceRow(0, _row(turns)))
        assert isinstance(made, Reject)
        assert (made.reason, made.detail) == wanted
    for mode in ("score", "pretrain"):
        made = _maker(processor, mode=mode).make(SourceRow(0, {"text": f"a {family.placeholder}"}))
        assert isinstance(made, Reject)
        assert made.reason == "placeholders_differ"


_DROPS = {
    "all images": (
        "{% for m in messages %}{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}|{% endfor %}"
    ),
    "all but the last": (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
        "{% elif loop.last %}<image>{% endif %}{% endfor %}|{% endfor %}"
    ),
    "those of earlier turns": (
        "{% for m in messages %}{% set last = loop.revindex < 3 %}{% for c in m.content %}"
        "{% if c.type == 'text' %}{{ c.text }}{% elif last %}<image>{% endif %}{% endfor %}|{% endfor %}"
    ),
}


@pytest.mark.parametrize("template", _DROPS.values(), ids=list(_DROPS))
def test_a_template_that_leaves_out_an_image_rejects_the_row_and_nothing_accepts_it(template: str) -> None:
    processor = processor_of(VISION_FAMILIES[0])
    processor.chat_template = template
    turns: Turns = [("user", ["*", "*", "a"]), ("assistant", "b"), ("user", ["*", "c"]), ("assistant", "d")]
    made = _maker(processor, loss_on="all").make(SourceRow(0, _row(turns)))
    assert isinstance(made, Reject)
    assert made.reason == "template_drops"
    assert "images" in made.detail


@pytest.mark.parametrize("splits", [None, False, True], ids=["llava", "idefics3", "idefics3 in tiles"])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, VISION_FAMILIES[1].template, VISION_FAMILIES[2].template])
def test_the_stored_tokens_expand_to_what_the_processor_makes_of_text_and_images(
    splits: bool | None, template: str
) -> None:
    tokenizer = vision_tokenizer(template)
    processor = llava_processor(tokenizer) if splits is None else idefics3_processor(tokenizer, splits=splits)
    turns = CHATS["images in several turns"]
    made = _made(processor, turns, loss_on="all")
    images = [decoded(item.data or b"", where="") for item in made.media]
    at = [item.position for item in made.media]
    (expanded,), _ = ImageExpander(processor).expand([made.token_ids], positions=[at], images=[images])
    text = _rendered(processor, turns)
    whole = processor(text=text, images=[images], add_special_tokens=False)["input_ids"][0]
    assert expanded.token_ids.tolist() == list(whole)


def test_the_settings_template_counts_before_the_processors_and_the_tokenizers() -> None:
    processor = processor_of(VISION_FAMILIES[0])
    processor.tokenizer.chat_template = "{{ raise_exception('of the tokenizer') }}"
    maker = _maker(processor)
    assert maker.template.text == VISION_FAMILIES[0].template
    processor.chat_template = {"default": VISION_FAMILIES[1].template, "other": "x"}
    assert _maker(processor).template.text == VISION_FAMILIES[1].template
    processor.chat_template = None
    assert _maker(processor).template.text == "{{ raise_exception('of the tokenizer') }}"
    assert maker.template_sha256 != _maker(processor).template_sha256
