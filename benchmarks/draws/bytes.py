"""Bytes of systematic draws in rows of 512 targets, by K, for the flat and the sharp teacher of `benchmarks.codec`.

The estimate of a capture (`pipeline/dry_run.py`) uses these figures. The first run trains the teacher, as that of
`benchmarks.codec`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common.command import is_quick, new_parser, set_threads
from benchmarks.common.report import finish
from benchmarks.inputs import CACHE

TOP_KS = (4, 8, 16, 32, 64, 128)
DRAWS, MIN_PROB = 64, 1e-4
ROWS = range(0, 60, 20)


def measure(cache: Path, name: str, rows: range) -> list[dict[str, Any]]:
    """Per K and way of drawing: bytes and draws per target. `iid` is what captures had before: at most 32 are kept."""
    import numpy as np
    import torch

    from benchmarks.codec.ours import our_header
    from benchmarks.codec.sides import Case
    from benchmarks.inputs.small_language_model import CONTEXT, VOCABULARY
    from benchmarks.inputs.teacher_distributions import load_distributions, load_teacher
    from benchmarks.inputs.teacher_rows import Limits
    from coldstill.pipeline.teachers.target_extractor import draw_uniforms, summarize, uniform_count
    from coldstill.storage_schema.codec import RowCodec

    distributions, teacher = load_distributions(cache)[name], load_teacher(cache)
    found = []
    logits = [torch.cat(list(teacher.logits(row, temperature=distributions.temperature))) for row in rows]
    for top_k in tqdm(TOP_KS, desc=name):
        for method, kept in (("none", 0), ("iid", 32), ("systematic", DRAWS)):
            draws = DRAWS if kept else 0
            limits = Limits(top_k=top_k, min_prob=MIN_PROB, draws=draws)
            case = Case(sharpness=name, limits=limits, rows=[])
            header = our_header(case, "fine").model_copy(update={"kept_draws": kept, "rows_per_unit": 1})
            codec, sizes, drawn = RowCodec(header), 0, 0
            for row, scores in zip(rows, logits, strict=True):
                labels = teacher.tokens[row, 1:]
                uniforms = draw_uniforms(
                    np.arange(CONTEXT),
                    draws=uniform_count(draws, draw_method=method),
                    seed=0,
                    sample_id=f"{name}-{row}",
                )
                targets = summarize(
                    scores,
                    labels,
                    uniforms,
                    top_k=top_k,
                    min_prob=MIN_PROB,
                    kept_draws=kept,
                    token_count=VOCABULARY,
                    systematic_draws=draws if method == "systematic" else 0,
                )
                sizes += sum(map(len, codec.encode(targets, labels=labels.numpy().astype(np.int32)).values()))
                drawn += targets.draw_ids.size
            positions = CONTEXT * len(rows)
            bytes_, draws_ = round(sizes / positions, 2), round(drawn / positions, 2)
            found.append({"top_k": top_k, "draws": method, "bytes": bytes_, "draws_kept": draws_})
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both teachers, and store a full run."""
    parser = new_parser(
        "draws.bytes",
        __doc__,
        make="bench-draws DEMO=DIR, which runs `benchmarks.draws` too",
        takes="minutes; the first run trains the teacher, about ten minutes more",
        quick="one row",
        result="draws_bytes",
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder that keeps the teacher for later runs")
    options, quick = parser.parse_args(arguments), is_quick()
    from benchmarks.inputs.teacher_distributions import SHARPNESSES

    set_threads()
    figures = {name: measure(options.cache, name, ROWS[:1] if quick else ROWS) for name in SHARPNESSES}
    finish("draws_bytes", figures, command="make bench-draws DEMO=DIR", quick=quick)


if __name__ == "__main__":
    main()
