"""The vision demo's models: batches are what the processor makes of the chats, and vLLM can serve both shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

import torch
from torch.nn import functional

from coldstill.common.processor import load_processor, placeholder_id, sees_images
from coldstill.demo.vision import models
from coldstill.demo.vision.models import (
    ChatEncoder,
    image_tokens,
    make_model,
    new_model,
    new_processor,
    parameter_count,
    pixels,
    target_hidden,
    target_labels,
    train_tokenizer,
)
from coldstill.demo.vision.scenes import Chat, make_chat
from coldstill.demo.vision.settings import MAX_TOKENS, STUDENT, TEACHER, Layout, Shape

TINY = Shape(
    width=32,
    layers=1,
    feed_forward=32,
    vision_width=32,
    vision_layers=1,
    vision_feed_forward=32,
    patch=16,
    merged=2,
    seed=3,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer()


@pytest.fixture(scope="module")
def chats() -> list[Chat]:
    """Chats of one question about two images, one and none."""
    return [make_chat(seed=0, part="test", number=number) for number in range(40)]


@pytest.mark.parametrize("shape", [TEACHER, STUDENT, TINY])
def test_a_batch_predicts_what_the_processors_own_inputs_predict(
    tokenizer: Any, chats: list[Chat], shape: Shape
) -> None:
    processor = new_processor(shape, tokenizer)
    model = new_model(shape, tokenizer).eval()
    encoder = ChatEncoder(processor)
    batch = encoder.batch(chats)
    hidden = target_hidden(model, batch)
    expected: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    labels: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for chat in chats:
        text = processor.apply_chat_template(chat.messages(), tokenize=False)
        images = [scene.image for scene in chat.scenes] or None
        inputs = processor(text=text, images=images, return_tensors="pt")
        ids = inputs["input_ids"][0]
        start = int((ids == tokenizer.convert_tokens_to_ids(models.ASSISTANT)).nonzero()[0])
        expected[len(ids) > encoder.short_row].append(model.model(**inputs).last_hidden_state[0, start:-1])
        labels[len(ids) > encoder.short_row].append(ids[start + 1 :])
    assert all(labels.values())
    assert torch.equal(target_labels(batch), torch.cat(labels[False] + labels[True]))
    torch.testing.assert_close(hidden, torch.cat(expected[False] + expected[True]), atol=1e-4, rtol=0)


def test_pixels_are_those_of_the_processor(tokenizer: Any, chats: list[Chat]) -> None:
    images = [scene.image for chat in chats for scene in chat.scenes]
    made = new_processor(TINY, tokenizer).image_processor([images], return_tensors="pt")
    torch.testing.assert_close(pixels(images), made["pixel_values"][0], atol=1e-6, rtol=0)


def test_several_questions_about_an_image_are_rows_that_do_not_read_each_other(tokenizer: Any) -> None:
    processor = new_processor(TINY, tokenizer)
    model, encoder = new_model(TINY, tokenizer).eval(), ChatEncoder(processor)
    chats = [make_chat(seed=0, part="test", number=number, turns=5) for number in range(6)]
    batch = encoder.batch(chats)
    assert len(batch.token_ids) == sum(len(chat.turns) for chat in chats)
    assert len(batch.pixels) == sum(len(chat.scenes) for chat in chats)
    alone = [encoder.batch([Chat(scenes=chat.scenes, turns=(turn,))]) for chat in chats for turn in chat.turns]
    alone.sort(key=lambda row: row.token_ids.shape[1] > encoder.short_row)
    expected = torch.cat([target_hidden(model, row) for row in alone])
    torch.testing.assert_close(target_hidden(model, batch), expected, atol=1e-4, rtol=0)


def test_the_template_marks_exactly_the_answers(tokenizer: Any, chats: list[Chat]) -> None:
    for chat in chats:
        encoded = tokenizer.apply_chat_template(
            chat.messages(), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        marked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        assert tokenizer.decode([id_ for id_, mark in marked if mark]) == chat.turns[0].answer + models.END
        assert encoded["input_ids"].count(tokenizer.convert_tokens_to_ids("<image>")) == len(chat.scenes)


def test_any_text_round_trips_and_the_tokenizer_is_always_the_same(tokenizer: Any) -> None:
    for text in ("Where is the circle? 42", "é中🙂\r\n  x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert train_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_processor_adds_no_token_to_the_tokenizer() -> None:
    tokenizer = train_tokenizer()
    before = len(tokenizer)
    new_processor(TINY, tokenizer)
    assert len(tokenizer) == before == new_model(TINY, tokenizer).config.text_config.vocab_size


def test_the_student_is_several_times_smaller_and_an_image_is_another_number_of_tokens(tokenizer: Any) -> None:
    teacher, student = (parameter_count(new_model(shape, tokenizer)) for shape in (TEACHER, STUDENT))
    assert teacher >= 4 * student
    assert image_tokens(TEACHER) != image_tokens(STUDENT)


@pytest.mark.parametrize("shape", [TEACHER, STUDENT])
def test_vllm_can_serve_the_shape_and_the_longest_row_fits(tokenizer: Any, shape: Shape) -> None:
    config = new_model(shape, tokenizer).config
    assert config.text_config.hidden_size // config.text_config.num_attention_heads == 32
    assert config.vision_config.hidden_size // config.vision_config.num_attention_heads == 32
    assert config.text_config.max_position_embeddings > MAX_TOKENS
    encoder = ChatEncoder(new_processor(shape, tokenizer))
    chats = [make_chat(seed=0, part="test", number=number, turns=20) for number in range(200)]
    assert encoder.batch(chats).token_ids.shape[1] <= MAX_TOKENS


def test_a_trained_folder_is_a_model_that_sees_images_and_the_loss_falls(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    make_model(Layout(tmp_path), tmp_path / "model", TINY, steps=12)
    processor = load_processor(AutoProcessor, str(tmp_path / "model"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert sees_images(model.config)
    assert placeholder_id(processor) == model.config.image_token_id
    batch = ChatEncoder(processor).batch([make_chat(seed=9, part="held_out", number=number) for number in range(30)])
    fresh = new_model(TINY, processor.tokenizer)
    losses = [
        functional.cross_entropy(each.lm_head(target_hidden(each, batch)), target_labels(batch))
        for each in (model, fresh)
    ]
    assert losses[0] < losses[1] - 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
