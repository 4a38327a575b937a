"""The vision demo's scenes and chats: all of them follow from a seed, and each answer is what its image shows."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

from PIL import Image

from coldstill.demo.vision.scenes import (
    CELL,
    COLORS,
    KINDS,
    PLACES,
    SHAPES,
    SIDE,
    Chat,
    Scene,
    Thing,
    Turn,
    answer_content,
    draw_scene,
    machine_fonts,
    make_chat,
    texts,
    write_part,
)

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}


@pytest.fixture(scope="module")
def chats() -> list[Chat]:
    return [make_chat(seed=0, part="test", number=number, turns=20) for number in range(150)]


def turns_of(chats: list[Chat], kind: str) -> list[tuple[Chat, Turn]]:
    found = [(chat, turn) for chat in chats for turn in chat.turns if turn.kind == kind]
    assert found, kind
    return found


def test_an_image_shows_each_thing_in_its_cell_in_its_color() -> None:
    for seed in range(100):
        scene = draw_scene(random.Random(seed), fonts=())
        assert scene.image.size == (SIDE, SIDE)
        assert scene.image.mode == "RGB"
        for place in range(4):
            row, column = divmod(place, 2)
            box = (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL)
            things = [thing for thing in scene.things if thing.place == place]
            assert seen_color(scene.image.crop(box)) == (things[0].color if things else None)


def seen_color(cell: Image.Image) -> str | None:
    """The color whose pixels are the most in a cell, beside its background."""
    seen: Counter[str] = Counter()
    for count, pixel in cell.getcolors(CELL * CELL) or ():
        distances = {name: max(abs(a - b) for a, b in zip(pixel, color, strict=True)) for name, color in COLORS.items()}
        nearest = min(distances, key=distances.__getitem__)
        if distances[nearest] <= 15:
            seen[nearest] += count
    return seen.most_common(1)[0][0] if seen else None


def test_shapes_of_one_size_and_color_look_different() -> None:
    drawn = set()
    for seed in range(400):
        scene = draw_scene(random.Random(seed), fonts=(), most=1)
        drawn.add(scene.things[0].name)
    assert drawn == {*SHAPES, *map(str, range(10))}


def test_every_answer_says_what_its_scenes_show(chats: list[Chat]) -> None:
    for chat, turn in turns_of(chats, "count"):
        assert NUMBERS[turn.content] == len(chat.scenes[0].things)
    for chat, turn in turns_of(chats, "color"):
        assert [thing.color for thing in named(chat.scenes[0], turn)] == [turn.content]
    for chat, turn in turns_of(chats, "place"):
        assert [PLACES[thing.place] for thing in named(chat.scenes[0], turn)] == [turn.content]
    for chat, turn in turns_of(chats, "shape"):
        assert [thing.shape for thing in chat.scenes[0].things if thing.color in turn.question] == [turn.content]
    for chat, turn in turns_of(chats, "digit"):
        assert [str(thing.digit) for thing in chat.scenes[0].things if thing.digit is not None] == [turn.content]
    for chat, turn in turns_of(chats, "thing"):
        place = PLACES.index(turn.question.removeprefix("What is at the ").removesuffix("?"))
        assert turn.content == at(chat.scenes[0], place)
    for chat, turn in turns_of(chats, "list"):
        assert turn.content.split(", ") == [at(chat.scenes[0], place) for place in range(4)]
    for chat, turn in turns_of(chats, "picture"):
        having = [bool(named(scene, turn)) for scene in chat.scenes]
        assert having == ([True, False] if turn.content == "first" else [False, True])
    for chat, _ in turns_of(chats, "text"):
        assert chat.scenes == ()


def named(scene: Scene, turn: Turn) -> list[Thing]:
    return [thing for thing in scene.things if turn.question.endswith((f" the {thing.shape}?", f" a {thing.shape}?"))]


def at(scene: Scene, place: int) -> str:
    names = [f"{thing.color} {thing.name}" for thing in scene.things if thing.place == place]
    return names[0] if names else "nothing"


def test_both_wordings_of_an_answer_occur_and_have_one_content(chats: list[Chat]) -> None:
    wordings: dict[str, set[bool]] = {kind: set() for kind in KINDS}
    for chat in chats:
        for turn in chat.turns:
            assert answer_content(turn.answer) == turn.content
            wordings[turn.kind].add(turn.answer == turn.content)
    assert wordings == {kind: {True, False} for kind in KINDS}


def test_the_tokenizer_learns_every_word_of_every_chat(chats: list[Chat]) -> None:
    words = set(" ".join(texts()).replace("?", " ").replace(",", " ").split())
    for chat in chats:
        for turn in chat.turns:
            assert set(f"{turn.question} {turn.answer}".replace("?", " ").replace(",", " ").split()) <= words


def test_a_chat_of_one_question_has_each_kind_about_as_often() -> None:
    kinds = Counter(make_chat(seed=0, part="test", number=number).turns[0].kind for number in range(2000))
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 60
    assert max(kinds.values()) < 500


def test_chats_have_two_images_one_or_none_before_the_first_question(chats: list[Chat]) -> None:
    assert {len(chat.scenes) for chat in chats} == {0, 1, 2}
    for chat in chats:
        messages = chat.messages()
        assert [message["role"] for message in messages] == ["user", "assistant"] * len(chat.turns)
        parts: list[dict[str, Any]] = [{"type": "image"}] * len(chat.scenes)
        first = [*parts, {"type": "text", "text": chat.turns[0].question}] if parts else chat.turns[0].question
        assert messages[0]["content"] == first


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        write_part(folder, "distill", seed=seed, rows=20, fonts=(), seen=set())
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        contents.append({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_parts_share_no_image_and_their_rows_name_files_that_exist(tmp_path: Path) -> None:
    seen: set[str] = set()
    digests: list[set[str]] = []
    for part in ("distill", "held_out"):
        write_part(tmp_path, part, seed=0, rows=60, fonts=(), seen=seen)
        rows = [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]
        assert len({row["id"] for row in rows}) == len(rows) == 60
        files = [(tmp_path / path).read_bytes() for row in rows for path in row["images"]]
        digests.append({hashlib.sha256(file).hexdigest() for file in files})
        assert len(digests[-1]) == len(files), "an image is in one row"
    assert not digests[0] & digests[1]


def test_an_image_of_an_earlier_part_is_left_out(tmp_path: Path) -> None:
    seen: set[str] = set()
    write_part(tmp_path / "one", "distill", seed=0, rows=5, fonts=(), seen=seen)
    write_part(tmp_path / "two", "distill", seed=0, rows=5, fonts=(), seen=seen)
    ids = [
        {json.loads(line)["id"] for line in (tmp_path / name / "distill.jsonl").read_text().splitlines()}
        for name in ("one", "two")
    ]
    with_images = [
        json.loads(line)["id"]
        for line in (tmp_path / "one" / "distill.jsonl").read_text().splitlines()
        if json.loads(line)["images"]
    ]
    assert not set(with_images) & ids[1]


def test_fonts_without_ten_different_digits_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert machine_fonts([tmp_path]) == ()
    assert machine_fonts([tmp_path / "missing"]) == ()
    for path in machine_fonts():
        assert path.suffix == ".ttf"
