"""Counts the files that a reader passes: from YAML to one committed unit, and from a batch to its loss.

A file is on a path where one of its functions runs: class bodies and module bodies do not count. The first path is a
capture of one unit of chats by the transformers engine in this process, so Ray's dispatch is not on it; files of
`storage_schema` are left out, because the format is a separate room. The second path is one micro-batch through
`DistillTrainer.compute_loss` and its backward pass: TAID on draws, fused head. Also counted: the files that the package
installs, and the lines of the longest.

Prints the files and ends with one JSON line.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import coldstill
from benchmarks.common.command import new_parser

PACKAGE = Path(coldstill.__file__).parent
ROOMS = sorted(path for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists())


def product_files() -> list[Path]:
    """Every Python file that the wheel installs, below the links of the three rooms at the top level too."""
    return sorted({*PACKAGE.glob("*.py"), *(file for room in ROOMS for file in room.rglob("*.py"))})


@contextmanager
def files_that_run() -> Iterator[list[str]]:
    """Files of the package, relative to it, in the order in which one of their functions first ran."""
    names = {str(file.resolve()): str(file.relative_to(PACKAGE)) for file in product_files()}
    names |= {str(file): str(file.relative_to(PACKAGE)) for file in product_files()}
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        is_function = frame.f_code.co_flags & inspect.CO_NEWLOCALS and frame.f_code.co_flags & inspect.CO_OPTIMIZED
        if event == "call" and is_function and (name := names.get(frame.f_code.co_filename)):
            found.setdefault(name)

    ran: list[str] = []
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield ran
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        ran += found


def capture_path(folder: Path) -> list[str]:
    """From a YAML file to the commit record of one unit."""
    from coldstill.common.config_file import load_config
    from coldstill.pipeline.config import CaptureConfig
    from coldstill.pipeline.prepare import prepare
    from coldstill.pipeline.worker import CaptureWorker
    from tests.pipeline.capturing import capture_config, write_config

    path = write_config(folder / "capture.yaml", capture_config(folder))
    with files_that_run() as ran:
        config = load_config(str(path), model=CaptureConfig)
        prepare(config, rank_ids=None)
        CaptureWorker(config).run(0)
    return [file for file in ran if not file.startswith("storage_schema/")]


def loss_path(folder: Path) -> list[str]:
    """From a collated batch to its loss and gradient."""
    import numpy as np
    from transformers import TrainingArguments

    from coldstill import DistillTrainer, load_logit_dataset
    from tests import making

    random = np.random.default_rng(0)
    tokenizer = making.tiny_tokenizer(folder / "tokenizer")
    rows = [making.random_row(random, f"row-{number}") for number in range(8)]
    header = making.tiny_header(tokenizer)
    making.write_dataset(folder / "dataset", [rows], header=header, tokenizer=tokenizer)
    trainer = DistillTrainer(
        str(making.tiny_llama(folder / "student")),
        TrainingArguments(str(folder / "run"), report_to="none", use_cpu=True),
        train_dataset=load_logit_dataset(str(folder / "dataset")),
    )
    assert trainer.head.formula is not None, "the fused head is not used"
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with files_that_run() as ran:
        loss: Any = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["targets"].count)
        loss.backward()
    return ran


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the two paths and the counts."""
    new_parser("reading_path", __doc__, takes="under a minute", result=None).parse_args(arguments)
    paths: dict[str, Callable[[Path], list[str]]] = {"yaml_to_unit": capture_path, "batch_to_loss": loss_path}
    counts: dict[str, int] = {}
    for name, trace in paths.items():
        with tempfile.TemporaryDirectory() as folder:
            files = trace(Path(folder))
        print(f"{name}: {len(files)} files", *files, sep="\n  ")
        counts[name] = len(files)
    lines = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in product_files()}
    longest = max(lines, key=lines.__getitem__)
    counts |= {"installed_files": len(lines), "longest_file_lines": lines[longest], "lines": sum(lines.values())}
    print(f"installed: {len(lines)} files, the longest is {longest}")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
