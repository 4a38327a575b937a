"""`coldstill import axolotl`: log-probs per position, as axolotl's KD trainer reads them, in; a sealed dataset out.

Read, from Parquet or JSON lines, as src/axolotl/integrations/kd gives them at 067b021 (`input_ids` is always needed:
axolotl makes the tokens anew from the messages at training time, and log-probs then sit beside other tokens):

- prepared: `target_token_ids`, `target_logprobs`, `target_mask`, one list per token, as after its preprocessing;
- raw, version 2: `logprobs` as lists of numbers with `target_token_ids`;
- raw, version 1: `logprobs` as lists of `{"token": "token_id:N", "logprob": x}`.

Raw lists may be fewer than the tokens and then belong to the last of them (`transform_logprobs` fills in on the left).
More of them than tokens is an error; axolotl keeps `logprobs[:-T]`, which are the wrong ones.

Which token a list is about, and which tokens are targets: `axolotl_rows.py`.

WHAT CANNOT BE UNDONE. Its preprocessing scales the kept probabilities to a sum of 1 and to `kd_temperature`: the mass
outside is lost. Such files are refused (`NotFullSoftmax`), and so is a temperature other than 1: the normaliser of the
full softmax would be needed. Import the raw lists instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from coldstill.storage_schema.manifest import Manifest
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.tokenizer import fingerprint

from .axolotl_columns import table_of
from .axolotl_rows import AxolotlRows, Predicts
from .errors import NotFullSoftmax, SourceUnreadable
from .files import JsonTables, ParquetTables, Tables, source_digest, source_files
from .importing import BadRows, Fidelity, import_rows, imported_header
from .plausible import SAMPLE_ROWS, check_alignment, check_not_renormalised


def import_axolotl(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path,
    teacher: str,
    revision: str | None = None,
    predicts: Predicts | None = None,
    logprobs_field: str = "logprobs",
    temperature: float = 1.0,
    top_k: int | None = None,
    vocab_size: int | None = None,
    fidelity: Fidelity = "fine",
    max_length: int = 131_072,
    rows_per_unit: int = 64,
    licence: str | None = None,
    bad_rows: BadRows = "fail",
    progress: bool = True,
) -> Manifest:
    """Import a folder, a file or files, local or fsspec URLs. The sealed dataset's manifest.

    `tokenizer`: local folder with the teacher's `tokenizer.json`. `predicts`: which token the row at a position is
    about; `axolotl_rows.py` says what is taken where it is not given. `temperature`: at which the log-probs were taken.
    `top_k`: entries kept at a position, by default as many as the first row has; vLLM lists hold one more where the
    real token is not among the first K. `bad_rows`, memory, a second start: see `import_rows`.

    Raises `SourceUnreadable`, `NotFullSoftmax`, `AlignmentDoubtful`, `UnusableRow`, `TokenizerNotFound`,
    `InvalidHeader`, `HeaderMismatch`.
    """
    if temperature != 1.0:
        raise NotFullSoftmax(
            "temperature",
            found=temperature,
            wanted="1.0",
            fix="capture again: the full softmax at 1 cannot be had from a few values of another one",
        )
    files = source_files(source, endings=(".parquet", ".jsonl"))
    tables: Tables
    if files[0].name.endswith(".jsonl"):
        tables = JsonTables(files, to_table=lambda document: table_of(document, logprobs_field=logprobs_field))
    else:
        tables = ParquetTables(files)
    prepared = _is_prepared(tables, logprobs_field)
    rows = AxolotlRows(
        tables,
        prepared=prepared,
        predicts=predicts or ("next" if prepared else "same"),
        logprobs_field=logprobs_field,
        token_count=fingerprint(tokenizer).token_count,
        top_k=top_k,
    )
    first = [item.row for item in itertools.islice(rows.items(0), SAMPLE_ROWS)]
    sample = [row for row in first if isinstance(row, CachedRow)]
    other = "same" if rows.predicts == "next" else "next"
    check_alignment(sample, fix=f"import with predicts={other!r}: see what it means, and how the file was made")
    if sample:
        check_not_renormalised(
            sample,
            token_count=rows.token_count,
            fix="import the file from before axolotl's preprocessing: the tail's mass is not in this one",
        )
    settings = {"layout": "axolotl", "predicts": rows.predicts, "logprobs_field": logprobs_field}
    header = imported_header(
        tokenizer,
        teacher=teacher,
        revision=revision,
        vocab_size=vocab_size,
        top_k=rows.top_k,
        fidelity=fidelity,
        max_length=max_length,
        rows_per_unit=rows_per_unit,
        source_sha256=source_digest(files, settings=settings, progress=progress),
        licence=licence,
    )
    return import_rows(rows, output, header=header, tokenizer=tokenizer, bad_rows=bad_rows, progress=progress)


def _is_prepared(tables: Tables, logprobs_field: str) -> bool:
    names = set(tables.names)
    if "input_ids" in names and {"target_token_ids", "target_logprobs"} <= names:
        return True
    if "input_ids" in names and logprobs_field in names:
        return False
    raise SourceUnreadable(
        "columns",
        found=sorted(names)[:40],
        wanted=f"input_ids, and target_token_ids with target_logprobs, or {logprobs_field}",
        fix="store the token ids that were scored: tokens made anew from messages may be others",
    )
