"""Draws images of a few things, and writes chats about them; all of it follows from a seed.

A scene has four cells, two by two, and a thing in one to four of them: a shape or a digit, in one color. A chat is
about one scene, two scenes or none. Each of its turns is a question of one kind and an answer in one of two wordings.

Each chat has a random stream of its own, made of the seed, the part and its number: any of them can be made alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFont import FreeTypeFont

SIDE = 64
"""Side of an image in pixels."""
CELL = SIDE // 2

COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 210),
    "yellow": (240, 196, 25),
    "black": (25, 25, 25),
    "pink": (240, 120, 190),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIGIT = "digit"
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
ORDER = ("first", "second")

KINDS = ("color", "shape", "count", "place", "thing", "digit", "list", "picture", "text")
"""Kinds of questions. `picture` is about two images, `text` about none."""

HARD = ("color", "place", "digit")
"""Kinds that a model learns last: a thing is found by its shape, or ten digits in several fonts are told apart."""
HEAD_START = 0.6

FACTS = (
    ("How many sides has a triangle?", "three"),
    ("How many sides has a square?", "four"),
    ("What color do blue and yellow make?", "green"),
    ("What color do red and white make?", "pink"),
    ("What shape is a wheel?", "circle"),
    ("What shape is a box?", "square"),
)

TWO_IMAGES, NO_IMAGE = 0.15, 0.05
"""Shares of the chats about two images and about none."""

FONT_FAMILIES = ("DejaVu", "FreeSans", "FreeSerif", "Liberation", "Noto Sans", "Noto Serif", "Roboto", "Ubuntu")
"""Families whose digits are plain; other fonts of a machine may show symbols in their places."""
FONT_FOLDERS = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"))
MAX_FONTS = 4


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A shape, or a digit if `digit` is one, in the cell of number `place`, which is an index of `PLACES`."""

    shape: str
    color: str
    place: int
    digit: int | None = None

    @property
    def name(self) -> str:
        """The shape, or which digit it is."""
        return self.shape if self.digit is None else str(self.digit)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Things in ascending cells, and the image of them: RGB, `SIDE` pixels square."""

    things: tuple[Thing, ...]
    image: Image.Image

    def only(self, *, shape: str | None = None, color: str | None = None) -> bool:
        """Whether exactly one thing has this shape or this color."""
        return sum(thing.shape == shape or thing.color == color for thing in self.things) == 1


@dataclass(frozen=True, kw_only=True)
class Chat:
    """The scenes that a chat is about, and its turns: question, answer as worded, the answer's content, and kind."""

    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]

    def messages(self) -> list[dict[str, Any]]:
        """The chat as a source has it: the images stand before the first question."""
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        parts = [{"type": "image"}] * len(self.scenes)
        if parts:
            messages[0]["content"] = [*parts, {"type": "text", "text": messages[0]["content"]}]
        return messages


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question, its answer in one of two wordings, and the words that every right answer has."""

    kind: str
    question: str
    answer: str
    content: str


def machine_fonts(folders: Sequence[Path] = FONT_FOLDERS) -> tuple[Path, ...]:
    """At most `MAX_FONTS` fonts of this machine, by name, that have ten different digits."""
    from PIL import ImageFont

    found: list[Path] = []
    paths = sorted({path.name: path for folder in folders for path in folder.rglob("*.ttf")}.items())
    for _, path in paths:
        try:
            font = ImageFont.truetype(path, 24)
            digits = {bytes(font.getmask(str(digit))) for digit in range(10)}
        except OSError:
            continue
        if _is_plain(str(font.getname()[0])) and len(digits) == 10:
            found.append(path)
    step = max(1, -(-len(found) // MAX_FONTS))
    return tuple(found[::step])


def _is_plain(family: str) -> bool:
    return family.startswith(FONT_FAMILIES) and not any(word in family for word in ("Math", "Symbol", "Emoji"))


@cache
def _font(path: Path | None, size: int) -> FreeTypeFont:
    """A font of the machine, or PIL's own if `path` is None; `size` in pixels."""
    from PIL import ImageFont

    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)  # type: ignore[return-value]


def draw_scene(rng: random.Random, *, fonts: Sequence[Path], most: int = 4) -> Scene:
    """A scene of one to `most` things, of which at most one is a digit."""
    from PIL import Image, ImageDraw

    count = rng.randint(1, most)
    places = sorted(rng.sample(range(4), count))
    with_digit = rng.choice(places) if rng.random() < 0.6 else None
    things = []
    for place in places:
        digit = rng.randrange(10) if place == with_digit else None
        shape = rng.choice(SHAPES) if digit is None else DIGIT
        things.append(Thing(shape=shape, color=rng.choice(list(COLORS)), place=place, digit=digit))
    light = rng.randint(215, 255)
    image = Image.new("RGB", (SIDE, SIDE), tuple(min(255, light + rng.randint(-8, 8)) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for thing in things:
        _draw_thing(draw, thing, rng, fonts=fonts)
    return Scene(things=tuple(things), image=image)


def _draw_thing(draw: Any, thing: Thing, rng: random.Random, *, fonts: Sequence[Path]) -> None:
    """Draw a thing of random size at a random point of its cell, in a color near its own."""
    color = tuple(max(0, min(255, channel + rng.randint(-15, 15))) for channel in COLORS[thing.color])
    size = rng.randint(15, 23)
    row, column = divmod(thing.place, 2)
    left = column * CELL + rng.randint(2, CELL - size - 2)
    top = row * CELL + rng.randint(2, CELL - size - 2)
    right, bottom = left + size, top + size
    if thing.digit is not None:
        font = _font(rng.choice(fonts) if fonts else None, size + 9)
        middle = left + size // 2, top + size // 2
        draw.text(middle, str(thing.digit), fill=color, font=font, anchor="mm")
    elif thing.shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=color)
    elif thing.shape == "square":
        draw.rectangle((left, top, right, bottom), fill=color)
    elif thing.shape == "triangle":
        draw.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=color)
    else:
        arm = size // 3
        draw.rectangle((left + arm, top, right - arm, bottom), fill=color)
        draw.rectangle((left, top + arm, right, bottom - arm), fill=color)


def make_chat(*, seed: int, part: str, number: int, turns: int = 1, most: int = 4, fonts: Sequence[Path] = ()) -> Chat:
    """Chat `number` of a part: up to `turns` questions about scenes of at most `most` things, as even over the kinds as
    the scenes allow."""
    rng = random.Random(f"{seed}/{part}/{number}")
    share = rng.random()
    if share < NO_IMAGE:
        question, answer = rng.choice(FACTS)
        return Chat(scenes=(), turns=(_turn(rng, "text", question, answer, "it is"),))
    scenes: tuple[Scene, ...] = (draw_scene(rng, fonts=fonts, most=most),)
    questions = list(_questions_of_one(scenes[0]))
    if share < NO_IMAGE + TWO_IMAGES:
        pair = (*scenes, draw_scene(rng, fonts=fonts, most=most))
        if about_both := list(_questions_of_pair(pair)):
            scenes, questions = pair, about_both
    rng.shuffle(questions)
    chosen = sorted(questions, key=_rank_of(rng, questions, turns).__getitem__)[:turns]
    return Chat(scenes=scenes, turns=tuple(_turn(rng, *question) for question in chosen))


Question = tuple[str, str, str, str]
"""Kind, text, content of the answer, and the words before it in the longer wording."""


def _rank_of(rng: random.Random, questions: list[Question], turns: int) -> dict[Question, tuple[bool, float]]:
    """An order of questions that takes one of each kind, in random order, before a second of any.

    Of several turns the first is the list, which says more about a scene than all other answers together, and `HARD`
    kinds come earlier.
    """
    first = {kind: rng.random() for kind in KINDS}
    asked = dict.fromkeys(KINDS, 0)
    rank = {}
    for question in questions:
        kind = question[0]
        sooner = HEAD_START if turns > 1 and kind in HARD else 0.0
        rank[question] = (turns > 1 and kind != "list", asked[kind] + first[kind] - sooner)
        asked[kind] += 1
    return rank


def _questions_of_one(scene: Scene) -> Iterator[Question]:
    """Every question about a scene that has one answer."""
    count = NUMBERS[len(scene.things)]
    yield "count", "How many things are there?", count, "just" if count == "one" else "there are"
    for thing in scene.things:
        if scene.only(shape=thing.shape):
            yield "color", f"What color is the {thing.shape}?", thing.color, "it is"
            yield "place", f"Where is the {thing.shape}?", PLACES[thing.place], "at the"
        if scene.only(color=thing.color):
            yield "shape", f"What shape is the {thing.color} one?", thing.shape, "a"
        if thing.digit is not None:
            yield "digit", "Which digit is it?", str(thing.digit), "it is"
    here = {thing.place: f"{thing.color} {thing.name}" for thing in scene.things}
    for place, name in enumerate(PLACES):
        yield "thing", f"What is at the {name}?", here.get(place, "nothing"), "a" if place in here else "there is"
    yield "list", "What is there?", ", ".join(here.get(place, "nothing") for place in range(4)), "there is"


def _questions_of_pair(scenes: Sequence[Scene]) -> Iterator[Question]:
    """Which of two pictures has a shape that the other lacks."""
    for shape in (*SHAPES, DIGIT):
        having = [any(thing.shape == shape for thing in scene.things) for scene in scenes]
        if sum(having) == 1:
            yield "picture", f"Which picture has a {shape}?", ORDER[having.index(True)], "the"


def _turn(rng: random.Random, kind: str, question: str, content: str, lead: str) -> Turn:
    """A turn whose answer is worded with `lead` before it in a third of all cases."""
    worded = f"{lead} {content}" if rng.random() < 1 / 3 else content
    return Turn(kind=kind, question=question, answer=worded, content=content)


def write_part(folder: Path, part: str, *, seed: int, rows: int, fonts: Sequence[Path], seen: set[str]) -> None:
    """Write `folder/PART.jsonl` with one chat of one question a line, and `folder/images/PART/NUMBER.png`.

    A line is `{"id", "messages", "images", "kind", "content"}`; images are paths relative to `folder`. Chats with an
    image whose digest is in `seen` are left out, and those of this part are added to it: no two parts share an image.
    """
    images = folder / "images" / part
    images.mkdir(parents=True)
    lines: list[str] = []
    number = -1
    while len(lines) < rows:
        number += 1
        chat = make_chat(seed=seed, part=part, number=number, fonts=fonts)
        files = [_png(scene.image) for scene in chat.scenes]
        digests = {hashlib.sha256(file).hexdigest() for file in files}
        if digests & seen:
            continue
        seen |= digests
        paths = [images / f"{number:05}{letter}.png" for letter, _ in zip("ab", files, strict=False)]
        for path, file in zip(paths, files, strict=True):
            path.write_bytes(file)
        (turn,) = chat.turns
        row = {"id": f"{part}/{number}", "messages": chat.messages()}
        row["images"] = [path.relative_to(folder).as_posix() for path in paths]
        lines.append(json.dumps({**row, "kind": turn.kind, "content": turn.content}) + "\n")
    (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


LEADS = ("it is ", "there are ", "there is ", "at the ", "just ", "the ", "a ")


def answer_content(answer: str) -> str:
    """What an answer says, whatever its wording."""
    text = " ".join(answer.split())
    for lead in LEADS:
        text = text.removeprefix(lead)
    return text


def texts() -> list[str]:
    """All questions and answers that can occur, from which the tokenizer learns its words."""
    found = [text for fact in FACTS for text in fact]
    things = (*SHAPES, DIGIT)
    found += [f"What color is the {one}? Where is the {one}? Which picture has a {one}?" for one in things]
    found += [f"What shape is the {one} one?" for one in COLORS]
    found += [f"What is at the {place}? How many things are there? Which digit is it?" for place in PLACES]
    found += [f"{lead}{word}" for lead in ("", " ", *LEADS) for word in (*COLORS, *things, *NUMBERS, *ORDER, "nothing")]
    found += ["What is there? red circle, nothing, nothing, blue cross"] * 9
    found += [f"{lead}{word}" for lead in ("", " ", *LEADS) for word in (*PLACES, *(str(digit) for digit in range(10)))]
    return found
