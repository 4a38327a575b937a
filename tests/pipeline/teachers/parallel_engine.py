"""A vLLM of several processes, in a separate process: `python -m ...parallel_engine text|adapter|images FOLDER OUTPUT`.

Scores the same rows twice and writes both answers, for a test to compare.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
from transformers import AutoConfig

from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.teachers.protocol import Teacher, TokenSequence, scored_of
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.header import DatasetHeader
from tests import making
from tests.pipeline.teachers import image_rows

TOP_K = 8


def rows() -> list[TokenSequence]:
    """Random tokens; of some rows only a part are targets."""
    generator = np.random.default_rng(0)
    return [
        TokenSequence(
            sample_id=f"row {i}",
            source_row=i,
            token_ids=generator.integers(0, making.VOCABULARY, length).astype(np.int32),
            target_spans=np.array([[length // 3, length - 1]], np.int32),
        )
        for i, length in enumerate((5, 60, 17, 120, 3, 90))
    ]


def header(folder: Path) -> DatasetHeader:
    """With draws."""
    changes = {
        "draws": 6,
        "kept_draws": 6,
        "max_length": 128,
        "vocab_size": AutoConfig.from_pretrained(folder).vocab_size,
    }
    return making.tiny_header(folder, top_k=TOP_K).model_copy(update=changes)


def config(folder: Path, **engine_args: object) -> TeacherConfig:
    """Of the same teacher; chunks of 64 tokens."""
    arguments = {**making.SMALL_ENGINE, "max_num_batched_tokens": 64, "max_num_seqs": 16, **engine_args}
    fields = {"model": str(folder), "top_k": TOP_K, "min_prob": 0.0, "max_length": 128, "dtype": "float32"}
    adapter = {"adapter": str(folder / "adapter")} if (folder / "adapter").is_dir() else {}
    return TeacherConfig.model_validate({**fields, **adapter, "engine_args": arguments})


def teacher_of(kind: str, folder: Path, **engine_args: object) -> tuple[Teacher, list[TokenSequence]]:
    """The teacher, and the rows to score: of text, or with images. Its adapter, if any, is in its folder `adapter`."""
    if kind != "images":
        return load_teacher(config(folder, **engine_args), header(folder)), rows()
    arguments = {"max_num_batched_tokens": 64, "max_num_seqs": 16, **engine_args}
    settings = image_rows.config(folder, "vllm", engine_args=arguments)
    return load_teacher(settings, image_rows.header(folder)), image_rows.rows(folder)


def main() -> None:
    """Score, and write what came."""
    kind, folder, output = sys.argv[1:]
    teacher, given = teacher_of(kind, Path(folder), tensor_parallel_size=2)
    answers = [[scored.targets for scored in scored_of(teacher.score(given))] for _ in range(2)]
    # Of this test's own making, and read by it alone.
    Path(output).write_bytes(pickle.dumps((answers, teacher.environment, teacher.processes)))


if __name__ == "__main__":
    main()
