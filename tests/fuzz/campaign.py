"""Runs mutants by number and decides which law each of them violates, if any."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .bases import make_bases
from .children import Child
from .mutants import Mutant, mutant

REGRESSIONS = Path(__file__).parent / "regressions.txt"
"""Mutants that once broke a law: `seed number` on each line; the rest of a line is a comment."""


class Verdict(NamedTuple):
    """`outcome`: "as before", "lawful", "named" or "FAULT"; `detail`: the named error, or what is wrong."""

    seed: int
    number: int
    kind: str
    resealed: bool
    outcome: str
    detail: str


def run(wanted: Iterable[tuple[int, int]]) -> Iterator[Verdict]:
    """The verdicts on mutants given by seed and number."""
    with tempfile.TemporaryDirectory(prefix="coldstill-fuzz-") as folder:
        bases = make_bases(Path(folder))
        with Child(bases[0].root) as child:
            sound = {base.name: child.read(base.root) for base in bases}
            for seed, number in wanted:
                made = mutant(seed, number, bases)
                answer = _read(child, made)
                yield Verdict(seed, number, made.kind, made.resealed, *judge(made, answer, sound[made.base.name]))


def regressions() -> list[tuple[int, int]]:
    """Seeds and numbers of `regressions.txt`."""
    lines = (line.split("#")[0].split() for line in REGRESSIONS.read_text().splitlines())
    return [(int(line[0]), int(line[1])) for line in lines if line]


def judge(made: Mutant, answer: dict[str, Any], sound: dict[str, Any]) -> tuple[str, str]:
    """Outcome and detail of what a child answered about a mutant of a base that reads as `sound`."""
    fault = _fault(made, answer, sound)
    if fault:
        return "FAULT", fault
    if answer["named"]:
        return "named", str(next(iter(answer["named"].values())))
    if answer["findings"]:
        return "named", answer["findings"][0]
    same = answer["rows"] == sound["rows"] == answer["single"]
    return ("as before" if same else "lawful"), ""


def _fault(made: Mutant, answer: dict[str, Any], sound: dict[str, Any]) -> str | None:
    if "died" in answer:
        return f"the process died: {answer['died']}"
    if answer["unnamed"]:
        return str(answer["unnamed"])
    if answer["unbounded"]:
        return str(answer["unbounded"])
    if not made.resealed:
        for way in ("rows", "single"):
            if answer[way] not in (None, sound[way]):
                return f"{way}: other rows than before, and no error"
    if answer["findings"] == []:
        if answer["unlawful"]:
            return f"verify --deep passes what is not lawful: {answer['unlawful']}"
        if answer["rows"] is None or answer["rows"] != answer["single"]:
            return f"verify --deep passes, but reading gives {answer['named'] or 'other rows by number than in order'}"
    return None


def _read(child: Child, made: Mutant) -> dict[str, Any]:
    """Have a mutant read in its base's own folder, and put back what was there."""
    before: dict[str, bytes] = made.base.files
    changed = {name: data for name, data in made.files.items() if before.get(name) != data}
    gone = [name for name in before if name not in made.files]
    root = made.base.root
    for name in gone:
        (root / name).unlink()
    for name, data in changed.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    answer = child.read(root)
    for name in changed:
        if name not in before:
            (root / name).unlink()
    for name in (*gone, *(name for name in changed if name in before)):
        (root / name).write_bytes(before[name])
    return answer
