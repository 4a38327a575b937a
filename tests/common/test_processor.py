"""Laws of expansion: a row becomes what the family's own processor makes of its text, token by token."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from coldstill.common.images import decoded
from coldstill.common.processor import (
    ImageExpander,
    ProcessorUnusable,
    expanded_positions,
    load_processor,
    placeholder_id,
    processor_settings,
    processor_sha256,
    sees_images,
    type_input_of,
)
from tests import making, vision

FAMILIES = {
    "idefics3": vision.idefics3_model,
    "idefics3 with tiles": lambda folder: vision.idefics3_model(folder, splits=True),
    "llava": vision.llava_model,
}
TEXT = "<s>user:{}What is this?{}\n\nAnd this:{}<end_of_utterance><s>assistant:It is red.<end_of_utterance>"


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make: Callable[[Path], Path] = FAMILIES[request.param]
    return make(tmp_path_factory.mktemp("model"))


def images_of(count: int) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(vision.image_bytes(seed, size=(30 + 40 * seed, 30)))).convert("RGB")
        for seed in range(count)
    ]


@pytest.mark.parametrize("counts", [(1,), (2,), (3,), (2, 0, 1), (0, 3), (1, 2, 0)])
def test_expanded_rows_and_inputs_are_those_of_the_processor_itself(folder: Path, counts: tuple[int, ...]) -> None:
    processor = load_processor(AutoProcessor, str(folder))
    expander = ImageExpander(processor)
    texts = [TEXT.format(*(["<image>"] * count + [""] * (3 - count))) for count in counts]
    images = [images_of(count) for count in counts]
    rows = [np.array(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    at = [np.flatnonzero(row == expander.placeholder_id) for row in rows]
    assert [len(places) for places in at] == list(counts)
    expanded, inputs = expander.expand(rows, positions=at, images=images)

    for text, row, shown, places, (token_ids, lengths) in zip(texts, rows, images, at, expanded, strict=True):
        if not shown:
            assert np.array_equal(token_ids, row)
            continue
        theirs = processor(text=[text], images=[shown], add_special_tokens=False)["input_ids"][0]
        assert token_ids.tolist() == list(theirs)
        # Every token of the text is at its expanded position.
        texts_at = np.setdiff1d(np.arange(row.size), places)
        moved = expanded_positions(texts_at, images=places, lengths=lengths)
        assert np.array_equal(token_ids[moved], row[texts_at])
        assert int((expander.token_types(token_ids)).sum()) == int((token_ids == processor.image_token_id).sum())
    shown_rows = [text for text, count in zip(texts, counts, strict=True) if count]
    theirs = processor(text=shown_rows, images=[each for each in images if each], padding=True, return_tensors="pt")
    assert set(inputs) == {name for name in theirs if name not in ("input_ids", "attention_mask")}
    for name, value in inputs.items():
        assert torch.equal(value, theirs[name])


def test_a_batch_gives_each_row_its_own_logits(folder: Path) -> None:
    """Rows with 2, 0 and 1 images together, as each alone: images go to their own rows."""
    expander = ImageExpander(load_processor(AutoProcessor, str(folder)))
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    images = [images_of(3)[:2], [], images_of(3)[2:]]
    rows, at = [], []
    for count in (2, 0, 1):
        text = TEXT.format(*(["<image>"] * count + [""] * (3 - count)))
        rows.append(np.array(expander.processor.tokenizer(text, add_special_tokens=False)["input_ids"]))
        at.append(np.flatnonzero(rows[-1] == expander.placeholder_id))
    expanded, inputs = expander.expand(rows, positions=at, images=images)
    width = max(row.token_ids.size for row in expanded)
    tokens, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for number, row in enumerate(expanded):
        tokens[number, : row.token_ids.size] = torch.from_numpy(row.token_ids)
        mask[number, : row.token_ids.size] = 1
    with torch.no_grad():
        together = model(input_ids=tokens, attention_mask=mask, **inputs).logits
        for number, (row, places, shown) in enumerate(zip(rows, at, images, strict=True)):
            (alone,), own = expander.expand([row], positions=[places], images=[shown])
            logits = model(input_ids=torch.from_numpy(alone.token_ids)[None], **own).logits[0]
            assert torch.allclose(together[number, : alone.token_ids.size], logits, atol=1e-4)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1, max_size=40),
)
def test_positions_are_counted_as_one_token_per_image(row: list[tuple[bool, int]]) -> None:
    """Against a row that is expanded token by token: a token is (is an image, tokens that it becomes)."""
    last_of = np.cumsum([length if is_image else 1 for is_image, length in row]) - 1
    images = np.array([place for place, (is_image, _) in enumerate(row) if is_image], np.int64)
    lengths = np.array([length for is_image, length in row if is_image], np.int64)
    found = expanded_positions(np.arange(len(row)), images=images, lengths=lengths)
    assert found.tolist() == last_of.tolist()


def test_facts_of_a_processor(folder: Path) -> None:
    processor = load_processor(AutoProcessor, str(folder))
    settings = processor_settings(processor)
    assert settings["image_token_id"] == placeholder_id(processor) == processor.image_token_id
    assert settings["size"]
    before = processor_sha256(processor)
    assert processor_sha256(load_processor(AutoProcessor, str(folder))) == before
    processor.image_processor.size = {"longest_edge": 999}
    assert processor_sha256(processor) != before


def test_which_models_see_images(folder: Path, tmp_path: Path) -> None:
    assert sees_images(AutoConfig.from_pretrained(folder))
    text = making.chat_model(tmp_path)
    assert not sees_images(AutoConfig.from_pretrained(text))
    with pytest.raises(ProcessorUnusable) as raised:
        load_processor(AutoProcessor, str(text))
    assert "  do:     " in str(raised.value)


def test_images_and_placeholders_of_different_number_are_refused(folder: Path) -> None:
    expander = ImageExpander(load_processor(AutoProcessor, str(folder)))
    row = np.array([5, expander.placeholder_id, 6])
    for positions, images in (([1, 2], images_of(1)), ([], images_of(1)), ([1], images_of(2))):
        with pytest.raises(ProcessorUnusable):
            expander.expand([row], positions=[np.array(positions, np.int64)], images=[images])


def test_the_argument_for_token_types_is_found_by_name() -> None:
    def forward(input_ids: object, token_type_ids: object = None) -> None: ...

    assert type_input_of(forward) == "token_type_ids"
    assert type_input_of(lambda input_ids: None) is None


@pytest.mark.parametrize(("edge", "tile", "tokens"), [(4 * 364, 364, 169), (2048, 512, 64)])
def test_a_photo_at_the_sizes_of_idefics3_and_smolvlm(edge: int, tile: int, tokens: int) -> None:
    """The photo is that of matplotlib's own examples; its tiles are those of the published models."""
    matplotlib = pytest.importorskip("matplotlib")
    photo = decoded(Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg").read_bytes(), where="photo")
    tokenizer = vision.vision_tokenizer()
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": edge}, max_image_size={"longest_edge": tile}),
        tokenizer,
        image_seq_len=tokens,
    )
    expander = ImageExpander(processor)
    text = TEXT.format("<image>", "", "<image>")
    row = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    at = np.flatnonzero(row == expander.placeholder_id)
    ((token_ids, lengths),), inputs = expander.expand([row], positions=[at], images=[[photo, photo.rotate(90)]])
    theirs = processor(text=[text], images=[[photo, photo.rotate(90)]], add_special_tokens=False)["input_ids"][0]
    assert token_ids.tolist() == list(theirs)
    tiles = -(-photo.width * edge // max(photo.size) // tile) * (edge // tile) + 1
    assert inputs["pixel_values"].shape[1:] == (2 * tiles, 3, tile, tile)
    assert (token_ids == expander.placeholder_id).sum() == 2 * tiles * tokens
    assert lengths.min() > tiles * tokens
