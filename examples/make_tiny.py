"""Make `examples/tiny` again: a small sealed dataset from the sources of this machine's Python library.

    python -m examples.make_tiny

The teacher is the demo's, with a vocabulary of 2,048, and reads the teacher's part of the text. The dataset holds its
distributions over functions of the distillation part, captured by the transformers engine. Takes five minutes on 2
cores. Intermediate results stay in `tiny_output/`, and a second run resumes there. Names in the dataset are relative
to that folder, so the dataset names nothing of this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import yaml

from coldstill.common.files import new_file, new_folder
from coldstill.demo.models import make_model, new_model, train_tokenizer
from coldstill.demo.settings import TEACHER, Layout, Shape
from coldstill.demo.text import read_rows, write_text

HERE = Path(__file__).parent
WORK = Path("tiny_output")
TEACHER_NAME = "python-library-4m"
"""The folder of the teacher, which is its name in the dataset."""
VOCABULARY = 2_048
"""A quarter of the demo's, because the tokenizer's file would otherwise be most of the dataset."""
TEACHER_TOKENS = 300_000
ROWS = 320
STUDENT = Shape(width=96, layers=2, heads=3, feed_forward=256, seed=1)
LICENSE_NAME = "PSF-2.0"
LICENSE_NOTE = f"""\
The texts of this dataset are functions of the standard library of Python {sys.version_info.major}.\
{sys.version_info.minor}, copied from its sources.
Copyright (c) 2001 Python Software Foundation; All Rights Reserved.
They are used under the PSF License Agreement (SPDX: {LICENSE_NAME}), which follows. Changes: comments of a module and
of a class, and all but functions, are left out; functions are dedented, and their bodies split from their signatures.

The tokenizer and the teacher, whose distributions are stored, were trained on the same sources.

"""


def capture_settings() -> dict[str, object]:
    """Settings of the capture; its working folder is `WORK`."""
    layout = Layout(Path())
    return {
        "output": str(layout.dataset),
        "source": {"path": str(layout.rows("distill", "pairs")), "loss_on": "assistant", "over_long": "cut"},
        "teacher": {
            "model": TEACHER_NAME,
            "engine": "transformers",
            "top_k": 8,
            "draws": 32,
            "max_length": 256,
        },
        "rows_per_unit": 160,
        "cluster": {"max_workers": 1},
        "license": LICENSE_NAME,
    }


def _coldstill(*arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    subprocess.run([sys.executable, "-m", "coldstill", *arguments], cwd=WORK, env=environment, check=True)


def make() -> None:
    """Run the missing steps, then replace `examples/tiny` and `examples/tiny_student`."""
    layout = Layout(WORK.resolve())
    if not layout.text.exists():
        with new_folder(layout.text) as folder:
            write_text(folder, distill_rows=ROWS, held_out_rows=ROWS)
    if not layout.tokenizer.exists():
        texts = (row["text"] for row in read_rows(layout.rows("teacher", "raw")))
        with new_folder(layout.tokenizer) as folder:
            train_tokenizer(texts, vocabulary=VOCABULARY).save_pretrained(folder)
    if not (layout.root / TEACHER_NAME).exists():
        make_model(layout, layout.root / TEACHER_NAME, TEACHER, tokens=TEACHER_TOKENS)
    with new_file(layout.root / "capture.yaml") as beside:
        beside.write_text(yaml.safe_dump(capture_settings(), sort_keys=False), encoding="utf-8")
    _coldstill("capture", "capture.yaml")
    _coldstill("card", "--replace", layout.dataset.name)
    _coldstill("verify", "--deep", layout.dataset.name)
    shutil.rmtree(HERE / "tiny", ignore_errors=True)
    # How long the capture took is a fact of this machine, not of the dataset.
    shutil.copytree(layout.dataset, HERE / "tiny", ignore=shutil.ignore_patterns("progress"))
    (HERE / "tiny" / "LICENSE").write_text(LICENSE_NOTE + _license_of_python(), encoding="utf-8")
    config = new_model(STUDENT, vocabulary=VOCABULARY).config.to_diff_dict()
    del config["transformers_version"]
    (HERE / "tiny_student").mkdir(exist_ok=True)
    (HERE / "tiny_student" / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _license_of_python() -> str:
    """The license text that Python installs beside its library, or its address where a package leaves it out."""
    path = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    return path.read_text("utf-8") if path.exists() else "https://docs.python.org/3/license.html\n"


if __name__ == "__main__":
    make()
