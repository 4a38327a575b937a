"""Rows of a sealed dataset as a source: token ids and target spans are scored as they are.

No template and no tokenizer runs, so another teacher scores exactly the same tokens. A work unit is a shard of the
dataset. The source's digest is the dataset's id, which covers all of its files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from coldstill.pipeline.errors import SourceEmpty, WriterRoundUnused
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.teachers.checkpoint import tokenizer_files
from coldstill.pipeline.teachers.protocol import TEACHER_TOKENS, TokenSequence
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.header_facts import RowWriter, TeacherPrompt
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, fingerprint_bytes, require_same_ids

from .conversation import RowUnusable
from .files import Reader, SourceFile, SourceRow, Survey, changed

_ROW = "stored row"
"""The column with a `CachedRow`; beside it only the column `id`."""
_FROM_ROWS = ("template_arguments", "template_date", "source_adapter")
"""Facts in `about` that tell how the rows were made, not how they were scored."""


class DatasetRows(Reader):
    """The rows of the sealed dataset at a local path or URL. A unit is one of its shards that has rows.

    Raises what `open_dataset` raises.
    """

    def __init__(self, root: str):
        self.dataset = open_dataset(root)
        name = f"{self.dataset.store.url}/{MANIFEST_NAME}"
        # The id stands for size and time stamp: it was computed just now from the whole manifest.
        super().__init__([SourceFile(name=name, bytes=None, stamp=self.dataset.dataset_id, rows=len(self.dataset))])
        self._shards = [number for number, shard in enumerate(self.dataset.shards) if shard.rows]

    def rows(self) -> Iterator[SourceRow]:
        """All rows in order, one shard in memory at a time."""
        for shard in self._shards:
            yield from self._of_shard(shard)

    def survey(self, rows_per_unit: int) -> Survey:
        """The units from the manifest; `rows_per_unit` is not used. Raises `SourceEmpty`."""
        if not self._shards:
            fix = "its rejects/ folder lists why each row was rejected"
            raise SourceEmpty(self.dataset.store.url, found="no rows", wanted="at least one row", fix=fix)
        counts = np.array([self.dataset.shards[shard].rows for shard in self._shards], np.int64)
        return Survey(self.dataset.dataset_id, len(self.dataset), None, self.files, unit_rows=counts)

    def read(self, unit: Unit) -> Iterator[SourceRow]:
        """The rows of one shard. Raises `SourceChanged`, and what `Dataset.read_shard` raises."""
        shard = self._shards[unit.index] if unit.index < len(self._shards) else None
        found = None if shard is None else (self.dataset.first_row(shard), self.dataset.shards[shard].rows)
        if shard is None or found != (unit.first_row, unit.rows):
            wanted = f"rows {unit.first_row} to {unit.first_row + unit.rows}"
            raise changed(self.dataset.store.url, unit=unit, found=f"another shard: {found}", wanted=wanted)
        return self._of_shard(shard)

    def _of_shard(self, shard: int) -> Iterator[SourceRow]:
        first = self.dataset.first_row(shard)
        for number, row in enumerate(self.dataset.shard_file(shard).rows(), start=first):
            media = tuple(replace(item, path=None, data=self.dataset.media_content(item)) for item in row.media)
            yield SourceRow(number, {"id": row.sample_id, _ROW: replace(row, media=media) if media else row})


class StoredSequences:
    """Makes the sequences of a sealed dataset's rows, and the facts that a header takes from that dataset.

    `writer_round`: the round in which a model wrote the rows; None if that is not set.

    Raises what `open_dataset` raises, `TokenizerMismatch` for a teacher whose ids mean other tokens, and
    `WriterRoundUnused` for a round that the header of the rows contradicts.
    """

    def __init__(self, root: str, tokenizer: PreTrainedTokenizerBase, *, writer_round: int | None):
        self._dataset, self._round = open_dataset(root), writer_round or 0
        self._rows: DatasetHeader = self._dataset.header
        if writer_round is not None:
            self._require_round(writer_round)
        facts = fingerprint_bytes(tokenizer_files(tokenizer)[TOKENIZER_FILE], where="the teacher's tokenizer")
        require_same_ids(
            f"tokenizer of source.rows_of {root}",
            self._rows.ids,
            facts.ids,
            of="the teacher",
            fix="choose a teacher with the tokenizer of these rows, or capture their text with source.path",
        )

    def has_media(self, columns: Mapping[str, Any]) -> bool:
        """Whether a row has images."""
        row: CachedRow = columns[_ROW]
        return bool(row.media)

    def sequence(
        self, number: int, columns: Mapping[str, Any], *, max_length: int, max_images: int, placeholder: int | None
    ) -> TokenSequence:
        """The sequence of a row. `placeholder`: the id that stands for an image; None for a teacher that sees none.

        Raises `RowUnusable`.
        """
        row: CachedRow = columns[_ROW]
        if row.token_ids.size > max_length:
            raise RowUnusable(RejectReason.OVER_LONG, f"{row.token_ids.size} tokens, at most {max_length}")
        if row.media and placeholder is None:
            raise RowUnusable(RejectReason.BAD_IMAGES, "the row has images, and the teacher reads text only")
        if len(row.media) > max_images:
            raise RowUnusable(RejectReason.TOO_MANY_IMAGES, f"{len(row.media)} images, at most {max_images}")
        if placeholder is not None:
            held = np.flatnonzero(row.token_ids == placeholder).tolist()
            if held != [item.position for item in row.media]:
                detail = f"{len(held)} tokens of the teacher's placeholder for {len(row.media)} images"
                raise RowUnusable(RejectReason.PLACEHOLDERS_DIFFER, detail)
        return TokenSequence(
            sample_id=row.sample_id,
            source_row=number,
            token_ids=np.array(row.token_ids, np.int32),
            target_spans=np.array(row.target_spans, np.int32),
            metadata=self._metadata(row),
            media=row.media,
        )

    def header(self, header: DatasetHeader) -> DatasetHeader:
        """`header`, of the scoring teacher, with the facts of the rows: template, targets, units and writer."""
        rows = self._rows
        facts: dict[str, object] = {name: getattr(rows.about, name) for name in _FROM_ROWS}
        if rows.about.end_token_ids is None:
            facts["end_token_ids"] = None  # of documents, which the teacher does not end
        writer = self._writer()
        about = header.about.model_copy(
            update={**facts, "writer": writer, "writer_prompt": self._writer_prompt(writer)}
        )
        return header.model_copy(
            update={
                "chat_template_sha256": rows.chat_template_sha256,
                "loss_on": rows.loss_on,
                "over_long": "reject",
                "rows_per_unit": max([1, *(shard.rows for shard in self._dataset.shards)]),
                "about": about,
            }
        )

    def _require_round(self, stated: int) -> None:
        """Raise `WriterRoundUnused` if the rows have a writer of another round, or none at all."""
        writer = self._writer()
        if (0 if writer is None else writer.round) != stated:
            found = f"the source wrote {self._dataset.store.url}"
            if writer is not None:
                found = f"{writer.name} wrote {self._dataset.store.url} in round {writer.round}, by its header"
            raise WriterRoundUnused(
                "source.round",
                found=f"{stated}, and {found}",
                wanted="the round in which a model wrote these rows",
                fix="remove source.round: the header of the rows names their writer",
            )

    def _metadata(self, row: CachedRow) -> Mapping[str, Any]:
        """The row's metadata without the length of a prompt that this teacher does not read."""
        if self._rows.teacher_prompt is None:
            return row.metadata
        return {name: value for name, value in row.metadata.items() if name != TEACHER_TOKENS}

    def _writer_prompt(self, writer: RowWriter | None) -> TeacherPrompt | None:
        """How the prompt was made that the writer read; None if it read that of the row."""
        is_new = writer is not None and self._rows.about.writer is None
        return self._rows.teacher_prompt if is_new else self._rows.about.writer_prompt

    def _writer(self) -> RowWriter | None:
        """The model that wrote the answers; None if the source of the rows did."""
        rows = self._rows
        if rows.about.writer is not None or rows.mode != "generate":
            return rows.about.writer
        teacher, adapter = rows.teacher, rows.teacher.adapter
        names, prints = [teacher.name], [teacher.weights_fingerprint]
        if adapter is not None:
            names, prints = [*names, adapter.name], [*prints, adapter.weights_fingerprint]
        return RowWriter(
            name=" + ".join(names),
            revision=teacher.revision,
            weights_fingerprint=" + ".join(prints),
            round=self._round,
        )
