"""Rows with images: each is read as the student's own processor has its text, whatever the patches, and moved targets
are found by a slow reference. Wrong images are named errors of their rows."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from coldstill.common.errors import ColdstillError
from coldstill.common.images import ImageTooLarge, ImageUnreadable, ImageUnsupported
from coldstill.storage_schema.errors import FileDamaged, FileMissing, InvalidRow
from coldstill.storage_schema.rows import CachedRow, MediaReference, spans_from_mask
from coldstill.trainer.data import images as module
from coldstill.trainer.data.images import Placed, RowExpander, StudentImages
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.errors import CursorMismatch, NoTargets, PackingUnsupported, RowTooLong, StudentSeesNoImages
from coldstill.trainer.student.positions import context_of
from coldstill.trainer.training_loop import BatchLoader
from tests import vision
from tests.trainer.training import arguments

from .datasets import all_same, names

COUNTS = [1, 0, 2, 3, 0, 1, 2, 1, 0, 3, 1]
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "idefics3": vision.idefics3_model,
    "idefics3 with tiles": lambda folder: vision.idefics3_model(folder, splits=True),
    "llava": vision.llava_model,
}

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.llava_model(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def rows(llava: Path) -> list[CachedRow]:
    return vision.vision_rows(llava, COUNTS, size=(70, 40))


@pytest.fixture(scope="module")
def dataset(rows: list[CachedRow], llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every second image or so is a file."""
    root = tmp_path_factory.mktemp("data") / "dataset"
    sizes = sorted(len(item.data) for row in rows for item in row.media)
    return vision.vision_dataset(root, [rows[:6], rows[6:]], tokenizer=llava, in_row_bytes=sizes[len(sizes) // 2])


def reads(folder: Path, **changes: Any) -> StudentImages:
    processor = AutoProcessor.from_pretrained(folder)
    return StudentImages(**{"processor": processor, "context": None, "name": "student", **changes})


def opened(item: MediaReference) -> Image.Image:
    return Image.open(io.BytesIO(item.data)).convert("RGB")


def test_a_batch_is_what_the_processor_makes_of_the_text_and_targets_follow_the_text(
    folder: Path, rows: list[CachedRow], dataset: Path
) -> None:
    images = reads(folder)
    tokenizer = images.processor.tokenizer
    (batch,) = load_logit_dataset(dataset).stream(batch_size=64, seed=0, epochs=1, shuffle=False, images=images)
    assert batch["sample_ids"] == [row.sample_id for row in rows]
    targets, number = batch["targets"], 0
    for b, row in enumerate(rows):
        text = tokenizer.decode(row.token_ids)
        shown = [opened(item) for item in row.media]
        theirs = images.processor(text=[text], images=[shown] if shown else None, add_special_tokens=False)
        wanted = list(theirs["input_ids"][0])
        length = int(batch["attention_mask"][b].sum())
        assert batch["input_ids"][b, :length].tolist() == wanted
        patches = [int(id_ == images.processor.image_token_id) for id_ in wanted]
        assert batch["token_types"][b].tolist() == patches + [0] * (batch["input_ids"].shape[1] - length)
        # Answers come after the images: counted from the end, nothing moves.
        for position in row.positions.tolist():
            assert (int(targets.row[number]), int(targets.position[number])) == (
                b,
                length - (row.token_ids.size - position),
            )
            assert int(targets.labels[number]) == int(row.token_ids[position + 1])
            assert int(batch["labels"][b, targets.position[number]]) == int(row.token_ids[position + 1])
            assert int(batch["stored_positions"][number]) == position
            number += 1
    assert number == targets.count
    with_images = [row for row in rows if row.media]
    theirs = images.processor(
        text=[tokenizer.decode(row.token_ids) for row in with_images],
        images=[[opened(item) for item in row.media] for row in with_images],
        padding=True,
        return_tensors="pt",
    )
    for name, value in batch["images"].items():
        assert torch.equal(value, theirs[name])


def test_targets_between_images_move_by_the_images_before_them(folder: Path) -> None:
    """Also at a placeholder itself, whose target is the token after its image; by a walk over the tokens."""
    images = reads(folder)
    expander = RowExpander(images)
    placeholder = images.processor.tokenizer.convert_tokens_to_ids("<image>")
    tokens = np.array([5, 6, placeholder, 7, 8, placeholder, 9, 10, 11], np.int32)
    contents = [vision.image_bytes(1, size=(70, 40)), vision.image_bytes(2, size=(20, 20))]
    mask = np.isin(np.arange(tokens.size), [1, 3, 4, 6, 8])  # tokens that are labels
    (row,) = vision.vision_rows(Path(images.processor.tokenizer.name_or_path), [0])
    row = replace(
        row,
        token_ids=tokens,
        target_spans=spans_from_mask(mask),
        media=tuple(
            MediaReference(position=at, type="image/png", sha256=hashlib.sha256(data).hexdigest(), data=data)
            for at, data in zip((2, 5), contents, strict=True)
        ),
    )
    (found,) = expander.expand([Placed(row, "there", lambda item: item.data)]).rows
    walked, at, place = [], [], 0
    for token in tokens.tolist():
        if token == placeholder:
            text = images.processor(text=["<image>"], images=[[opened(row.media[place])]])["input_ids"][0]
            walked += list(text)
            place += 1
        else:
            walked.append(token)
        at.append(len(walked) - 1)
    assert found.token_ids.tolist() == walked
    assert found.positions.tolist() == [at[position] for position in row.positions.tolist()]
    assert found.token_ids[found.positions + 1].tolist() == tokens[row.positions + 1].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_change_nothing_and_a_cursor_resumes(
    folder: Path, dataset: Path, tmp_path: Path, workers: int
) -> None:
    stream = load_logit_dataset(dataset).stream(batch_size=3, seed=5, epochs=2, images=reads(folder))
    alone = list(stream)
    again = BatchLoader(stream, arguments(tmp_path, dataloader_num_workers=workers))
    assert all_same(list(again), alone)
    stream.seek(alone[2]["cursor"])
    assert all_same(list(stream), alone[3:])


@pytest.mark.timeout(120)
def test_loader_workers_do_not_wait_for_threads_that_a_fork_lacks(
    folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the environment demands the threads of the tokenizers library, and this process has started them."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    images = reads(folder)
    images.processor.tokenizer(["a text"] * 1000)
    stream = load_logit_dataset(dataset).stream(batch_size=3, seed=5, epochs=1, images=images)
    assert names(list(BatchLoader(stream, arguments(tmp_path, dataloader_num_workers=2)))) == names(list(stream))


def test_the_order_does_not_depend_on_the_student_s_patches(dataset: Path, llava: Path, tmp_path: Path) -> None:
    idefics = vision.idefics3_model(tmp_path / "idefics", splits=True)
    logits = load_logit_dataset(dataset)
    orders = [
        names(list(logits.stream(batch_size=2, seed=1, epochs=1, images=reads(student))))
        for student in (llava, idefics)
    ]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted(f"row-{number}" for number in range(len(COUNTS)))


def test_rows_without_images_are_the_rows_of_a_dataset_that_has_no_others(
    dataset: Path, rows: list[CachedRow], llava: Path, tmp_path: Path
) -> None:
    logits = load_logit_dataset(dataset, rows="without_images")
    assert logits.rows == COUNTS.count(0)
    assert not logits.shows_images
    stream = logits.stream(batch_size=2, seed=0, epochs=3)
    assert stream.batches_per_epoch == 2
    batches = list(stream)
    wanted = sorted(row.sample_id for row in rows if not row.media)
    assert [len(batch["sample_ids"]) for batch in batches] == [2, 1] * 3
    for epoch in range(3):
        assert sorted(names(batches[2 * epoch : 2 * epoch + 2])) == wanted
    stream.seek(batches[3]["cursor"])
    assert all_same(list(stream), batches[4:])
    assert list(logits.stream(batch_size=1, seed=0, epochs=1, pack_length=200))
    for here, there in (("all", "without_images"), ("without_images", "all")):
        cursor = load_logit_dataset(dataset, rows=here, weights=[1.0]).stream(batch_size=2, seed=0)._identity()
        with pytest.raises(CursorMismatch, match="cursor: rows"):
            load_logit_dataset(dataset, rows=there, weights=[1.0]).stream(batch_size=2, seed=0).seek(cursor)

    only = vision.vision_dataset(tmp_path / "only", [[row for row in rows if row.media]], tokenizer=llava)
    with pytest.raises(NoTargets, match="all with images"):
        load_logit_dataset(only, rows="without_images")


def test_a_student_of_text_and_packs_refuse_a_row_with_images(dataset: Path, llava: Path) -> None:
    logits = load_logit_dataset(dataset)
    with pytest.raises(StudentSeesNoImages, match=r"data\.rows to without_images"):
        list(logits.stream(batch_size=4, seed=0, epochs=1))
    with pytest.raises(PackingUnsupported, match="pack_length to null"):
        list(logits.stream(batch_size=4, seed=0, epochs=1, pack_length=400, images=reads(llava)))


def test_a_row_that_is_longer_than_the_student_s_context_is_named_with_the_numbers(
    dataset: Path, rows: list[CachedRow], llava: Path
) -> None:
    lengths = {row.sample_id: row.token_ids.size + 15 * len(row.media) for row in rows}
    longest = max(lengths, key=lambda name: lengths[name])
    images = reads(llava, context=lengths[longest] - 1)
    with pytest.raises(RowTooLong) as error:
        list(load_logit_dataset(dataset).stream(batch_size=1, seed=0, epochs=1, images=images))
    assert longest in error.value.what
    assert str(lengths[longest]) in str(error.value.found)
    assert str(lengths[longest] - 1) in str(error.value.wanted)
    fits = reads(llava, context=lengths[longest])
    assert list(load_logit_dataset(dataset).stream(batch_size=1, seed=0, epochs=1, images=fits))
    assert context_of(AutoConfig.from_pretrained(llava)) == 1024


def broken(row: CachedRow, data: bytes, type_: str = "image/png") -> CachedRow:
    """The row with another content of its first image, whose digest is right."""
    first = MediaReference(
        position=row.media[0].position, type=type_, sha256=hashlib.sha256(data).hexdigest(), data=data
    )
    return replace(row, media=(first, *row.media[1:]))


def jpeg() -> bytes:
    return vision.image_bytes(format="JPEG")


HOSTILE: dict[str, tuple[Callable[[], tuple[bytes, str]], type[ColdstillError]]] = {
    "cut": (lambda: (vision.image_bytes()[:-400], "image/png"), ImageUnreadable),
    "no image": (lambda: (b"<svg/>", "image/png"), ImageUnreadable),
    "bomb": (lambda: (bomb(), "image/png"), ImageTooLarge),
    "another type": (lambda: (jpeg(), "image/png"), ImageUnsupported),
    "sound": (lambda: (b"RIFF", "audio/wav"), ImageUnsupported),
    "two frames": (lambda: (frames(), "image/gif"), ImageUnsupported),
}


def bomb() -> bytes:
    """A small file of 1.6e9 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def frames() -> bytes:
    file = io.BytesIO()
    first, second = (Image.new("RGB", (9, 9), color) for color in ("red", "blue"))
    first.save(file, "GIF", save_all=True, append_images=[second])
    return file.getvalue()


def failing(error: type[ColdstillError], root: Path, images: StudentImages, output: Path, workers: int) -> str:
    stream = load_logit_dataset(root).stream(batch_size=2, seed=0, epochs=1, shuffle=False, images=images)
    with pytest.raises(error) as raised:
        list(BatchLoader(stream, arguments(output, dataloader_num_workers=workers)))
    assert type(raised.value) is error
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_image_is_a_named_error_of_its_row(
    rows: list[CachedRow], llava: Path, tmp_path: Path, kind: str, workers: int
) -> None:
    make, error = HOSTILE[kind]
    hostile = [*rows[:3], broken(rows[3], *make()), *rows[4:]]
    try:
        root = vision.vision_dataset(tmp_path / "data", [hostile], tokenizer=llava)
    except InvalidRow:
        pytest.skip("the format refuses to store it")
    text = failing(error, root, reads(llava), tmp_path / "out", workers)
    assert "row-3" in text
    assert "image 0" in text


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["missing", "swapped", "cut", "grown"])
def test_a_damaged_file_of_media_is_a_named_error_of_its_row(
    rows: list[CachedRow], llava: Path, tmp_path: Path, kind: str, workers: int
) -> None:
    root = vision.vision_dataset(tmp_path / "data", [rows], tokenizer=llava, in_row_bytes=0)
    victim = root / f"media/{rows[3].media[1].sha256}.png"
    other = root / f"media/{rows[5].media[0].sha256}.png"
    if kind == "missing":
        victim.unlink()
    elif kind == "swapped":
        victim.write_bytes(other.read_bytes())
    elif kind == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    else:
        victim.write_bytes(victim.read_bytes() + b"x")
    error = FileMissing if kind == "missing" else FileDamaged
    text = failing(error, root, reads(llava), tmp_path / "out", workers)
    assert "row-3" in text
    assert "image 1" in text


def test_a_token_of_an_image_without_an_image_is_a_named_error(rows: list[CachedRow], llava: Path) -> None:
    """Else the model of a batch would have more places for patches than patches."""
    expander = RowExpander(reads(llava))
    placed = Placed(replace(rows[2], media=rows[2].media[:1]), "there", lambda item: item.data)
    with pytest.raises(InvalidRow, match="row-2"):
        expander.expand([placed])
    row = rows[2]
    labels = np.arange(row.token_ids.size) == row.media[1].position
    with pytest.raises(InvalidRow, match="label is the placeholder"):
        expander.expand([placed._replace(row=replace(row, target_spans=spans_from_mask(labels)))])


def test_the_row_that_a_processor_refuses_is_found(
    rows: list[CachedRow], llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = reads(llava)
    expander = RowExpander(images)
    inner = module.ImageExpander.expand

    def refusing(self: Any, tokens: Any, **given: Any) -> Any:
        if any(row.size == rows[5].token_ids.size and np.array_equal(row, rows[5].token_ids) for row in tokens):
            raise module.ProcessorUnusable("processor P", found="an image that is too flat")
        return inner(self, tokens, **given)

    monkeypatch.setattr(module.ImageExpander, "expand", refusing)
    with pytest.raises(module.ProcessorUnusable, match="row-5"):
        expander.expand([Placed(row, "there", lambda item: item.data) for row in rows])
