"""`coldstill import distillkit`: import a logit capture of arcee-ai/DistillKit.

Parquet files with `input_ids` and one of three sets of columns, as in its README, `sample_common.py` and
`compressor.py` at a61c2e7. New: `compressed_logprobs`, `bytepacked_indices`. Old: `packed_indices`, `exact_values`,
`coeffs`. Not compressed: `token_ids`, `top_values`. `compression_config.yaml` holds the settings of the first two.

`distillkit_rows.py` explains the alignment of rows with tokens, and packed rows.

The files do not hold the tail mass, the label's log-prob outside the kept ids (`derived_targets.py` derives both),
draws, or the teacher's name. They do not mark the pad token that a capture appends to short texts: `pad_id` removes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import fsspec

from coldstill.storage_schema.manifest import Manifest
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.tokenizer import fingerprint
from coldstill.tools.errors import CompressionUnknown, SourceUnreadable

from .distillkit_compression import MAX_CONFIG_BYTES, Compression, Legacy, parse_config
from .distillkit_rows import LAYOUTS, DistillKitRows
from .importing import import_with, require_plausible
from .input_files import ParquetTables, import_facts, input_files, source_digest
from .settings import DistillKitSettings

CONFIG_NAME = "compression_config.yaml"
_LAYOUT_NAMES = {
    "quantised": "lossy compression by logprob_compressor",
    "legacy": "lossy compression by legacy_logit_compression",
    "plain": "log-probs without compression",
}
"""The layouts for people, in the header and on the card."""


def import_distillkit(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    settings: DistillKitSettings,
    *,
    progress: bool = True,
) -> Manifest:
    """Import a folder, a file or several files, local paths or fsspec URLs; the manifest of the sealed dataset.

    `settings.config` may also be a training configuration that holds the compression settings. Tokens are targets where
    the column `labels` is not -100, and all are without that column. The curves of both compressors are too coarse to
    show a tail, so that `settings.normalized_over` must state one; `plausibility.py` explains this. `within_mass`
    explains sums above 1, `derived_targets` the tail, and `import_rows` `bad_rows`, memory, and how an import resumes.

    Raises `UnsupportedStore`, `SourceUnreadable`, `CompressionUnknown`, `NotFullSoftmax`, `AlignmentDoubtful`,
    `UnusableRow`, `TokenizerNotFound`, `InvalidHeader`, `HeaderMismatch`.
    """
    Store(output).require_usable()  # all files are read before the first write
    files = input_files(source, endings=(".parquet",))
    tables = ParquetTables(files)
    layout = _layout(tables)
    compression = None if layout == "plain" and settings.config is None else _compression(source, settings.config)
    if layout != "plain" and isinstance(compression, Legacy) != (layout == "legacy"):
        raise CompressionUnknown(
            "compression settings",
            found=f"settings of the {'old' if isinstance(compression, Legacy) else 'new'} compressor",
            wanted=f"settings of the columns {LAYOUTS[layout]}",
            fix="check that these are the settings of the capture",
        )
    token_count = fingerprint(settings.tokenizer).token_count
    rows = DistillKitRows(
        tables,
        layout=layout,
        compression=compression,
        token_count=token_count,
        pad_id=settings.pad_id,
        progress=progress,
        renormalized=settings.normalized_over == "kept",
    )
    plausibility = require_plausible(
        rows, settings, token_count=token_count, mass_fix="capture again without renormalizing over the kept ids"
    )
    facts = {
        "layout": f"distillkit {layout}",
        "compression": compression.model_dump(mode="json") if compression else None,
        "pad_id": settings.pad_id,
    }
    if settings.normalized_over == "kept":
        facts["normalized_over"] = "kept"
    imported = import_facts(files, tool="DistillKit", version=settings.tool_version, layout=_LAYOUT_NAMES[layout])
    digest = source_digest(files, settings=facts, progress=progress)
    columns = compression.d if compression else 0
    return import_with(
        settings,
        rows,
        output,
        columns=columns,
        top_k=rows.top_k,
        source_sha256=digest,
        imported=imported,
        plausibility=plausibility,
        progress=progress,
    )


def _layout(tables: ParquetTables) -> str:
    for layout, columns in LAYOUTS.items():
        if {"input_ids", *columns} <= set(tables.names):
            return layout
    raise SourceUnreadable(
        "columns",
        found=tables.names,
        wanted=f"input_ids and one of {list(LAYOUTS.values())}",
        fix="pass the Parquet files that DistillKit's capture wrote",
    )


def _compression(source: str | Path | Sequence[str | Path], config: str | None) -> Compression:
    if config is None:
        first = source if isinstance(source, (str, Path)) else source[0]
        folder = str(first) if not str(first).endswith(".parquet") else str(first).rpartition("/")[0]
        config = f"{folder.rstrip('/') or '.'}/{CONFIG_NAME}"
    try:
        with fsspec.open(str(config), "rb") as stream:
            data = cast(bytes, stream.read(MAX_CONFIG_BYTES + 1))
    except OSError as error:
        raise CompressionUnknown(
            str(config),
            found=str(error),
            wanted="the settings that the capture was compressed with",
            fix="pass them with --config: the bytes mean nothing without them",
        ) from None
    return parse_config(data, where=str(config))
