"""`coldstill import axolotl`: import log-probs per position in the layout of axolotl's KD trainer.

Parquet files or JSON lines with the columns of src/axolotl/integrations/kd at 067b021. `input_ids` is required: axolotl
tokenizes the messages again at training time, and log-probs may then belong to other tokens.

- prepared: `target_token_ids`, `target_logprobs`, `target_mask`, one list per token, as after its preprocessing;
- raw, version 2: `logprobs` as lists of numbers with `target_token_ids`;
- raw, version 1: `logprobs` as lists of `{"token": "token_id:N", "logprob": x}`.

If there are fewer raw lists than tokens, they belong to the last tokens (`transform_logprobs` pads on the left). More
lists than tokens are an error; axolotl keeps `logprobs[:-T]`, which are the wrong ones.

`axolotl_rows.py` says which token a list is about, and which tokens are targets.

NOT INVERTIBLE. axolotl's preprocessing scales the kept probabilities to a sum of 1 and to `kd_temperature`, which loses
the mass outside them. Such files are rejected (`NotFullSoftmax`) unless `normalized_over` states it, and so is a
temperature other than 1, which would need the normalizer of the full softmax. Import the raw lists instead.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from coldstill.storage_schema.manifest import Manifest
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.tokenizer import fingerprint
from coldstill.tools.errors import NotFullSoftmax, SourceUnreadable

from .axolotl_rows import AxolotlRows, Predicts, table_of
from .importing import import_with, require_plausible
from .input_files import JsonTables, ParquetTables, Tables, import_facts, input_files, source_digest
from .settings import AxolotlSettings


def import_axolotl(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    settings: AxolotlSettings,
    *,
    progress: bool = True,
) -> Manifest:
    """Import a folder, a file or several files, local paths or fsspec URLs; the manifest of the sealed dataset.

    `axolotl_rows.py` explains the default of `settings.predicts`. vLLM's lists have one entry more than its K where the
    actual token is not among the first K. `plausibility.py` explains what is refused unless
    `settings.normalized_over` or `settings.assume_aligned` states it. `import_rows` explains `bad_rows`, memory, and
    how an import resumes.

    Raises `UnsupportedStore`, `SourceUnreadable`, `NotFullSoftmax`, `AlignmentDoubtful`, `UnusableRow`,
    `TokenizerNotFound`, `InvalidHeader`, `HeaderMismatch`.
    """
    if settings.temperature != 1.0:
        raise NotFullSoftmax(
            "temperature",
            found=settings.temperature,
            wanted="1.0",
            fix="capture again at temperature 1: a few log-probs at another temperature do not give the full softmax",
        )
    Store(output).require_usable()  # all files are read before the first write
    files = input_files(source, endings=(".parquet", ".jsonl"))
    tables: Tables
    if files[0].name.endswith(".jsonl"):
        tables = JsonTables(files, to_table=lambda document: table_of(document, logprobs_field=settings.logprobs_field))
    else:
        tables = ParquetTables(files)
    prepared = _is_prepared(tables, settings.logprobs_field)
    make = functools.partial(
        AxolotlRows,
        tables,
        prepared=prepared,
        logprobs_field=settings.logprobs_field,
        token_count=fingerprint(settings.tokenizer).token_count,
        top_k=settings.top_k,
        renormalized=settings.normalized_over == "kept",
    )
    rows = make(predicts=settings.predicts or ("next" if prepared else "same"))
    other: Predicts = "same" if rows.predicts == "next" else "next"
    plausibility = require_plausible(
        rows,
        settings,
        token_count=rows.token_count,
        mass_fix="import the file from before axolotl's preprocessing: this one does not hold the tail's mass",
        alternatives={
            f"predicts={other!r} (--predicts {other}) fits the first rows": functools.partial(make, predicts=other)
        },
    )
    facts = {"layout": "axolotl", "predicts": rows.predicts, "logprobs_field": settings.logprobs_field}
    if settings.normalized_over == "kept":
        facts["normalized_over"] = "kept"
    layout = "columns as after its preprocessing" if prepared else "raw lists of log-probs"
    imported = import_facts(files, tool="axolotl KD", version=settings.tool_version, layout=layout)
    digest = source_digest(files, settings=facts, progress=progress)
    return import_with(
        settings,
        rows,
        output,
        top_k=rows.top_k,
        source_sha256=digest,
        imported=imported,
        plausibility=plausibility,
        progress=progress,
    )


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
        fix="store the token ids that were scored: tokenizing the messages again may give other ids",
    )
