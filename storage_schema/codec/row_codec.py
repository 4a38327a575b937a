"""Encodes the targets of a row as named zstd streams, and decodes them.

`TeacherTargets` and labels of a row become `{stream name: frame}` (FORMAT.md, "Streams"); an empty stream is an
empty value.
Shape letters: `N` target positions of the row, `K` teacher top-k, `R` kept draws of all positions.

Decoding subtracts the log of a position's total mass from its values: a decoded position sums to 1, tail included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from coldstill.storage_schema.errors import StreamDamaged
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import LOG_FLOOR, TeacherTargets

from .byte_planes import ESCAPE, half_planes, to_planes
from .draws import DrawStreams
from .frames import SCRATCH, Frames, compress, split
from .kept_entries import Float16Entries, GridEntries, IdRanks, id_width

STREAMS = (
    "counts",
    "ids",
    "id_escapes",
    "logprobs",
    "logprob_escapes",
    "last_levels",
    "log_tail",
    "label_logprob",
    "draw_counts",
    "draw_ids",
    "draw_id_escapes",
    "draw_logprobs",
)
"""Names of the streams in order; each is a column of a shard."""

MAX_ENTRIES = 1 << 24
"""Maximum number of entries (positions times K, or kept draws) of one row: 128 MiB of ids and log-probs when
decoded."""


MOST_ROW_OVERHEAD = len(STREAMS) * 32
"""Most bytes of a row that hold no value: what zstd puts around each stream, and its length in a shard."""


def most_position_bytes(
    *, codec: str, top_k: int, token_count: int, kept_draws: int = 0, draw_logprobs: bool = False
) -> float:
    """Most bytes of a target position, where nothing can be compressed, without `MOST_ROW_OVERHEAD`.

    `codec`, `top_k` (K), `token_count`, `kept_draws` and `draw_logprobs` are those of a header.
    """
    width = id_width(token_count)

    def sorted_ids(number: int) -> int:  # the distances of a position add up to less than `token_count`
        return number + width * min(number, token_count // ESCAPE)

    if codec == "grid":
        entries = sorted_ids(top_k) + 3 * top_k + 4  # last and tail level
    else:
        entries = (width + 2) * top_k + 2
    draws = 2 + sorted_ids(kept_draws) + 2 * draw_logprobs * kept_draws if kept_draws else 0
    values = 2 + entries + 2 + draws  # the count before the entries, the label's log-prob after them
    return values * (1 + 2.0**-15)  # zstd puts three bytes before each 128 KiB


class RowCodec:
    """Encodes and decodes the rows of one dataset. Threads may share it."""

    def __init__(self, header: DatasetHeader):
        self.header = header
        ranks = IdRanks(header.id_ranks, token_count=header.token_count)
        self._kept = GridEntries(header, ranks) if header.codec.name == "grid" else Float16Entries(header)
        self._draws = DrawStreams(header, ranks)
        self._count_width = 1 if header.top_k <= 255 else 2

    def encode(self, targets: TeacherTargets, *, labels: np.ndarray) -> dict[str, bytes]:
        """Frames of one row. `labels int32 [N]`: the token that follows each position. Its log-prob is stored only
        where the position does not keep it."""
        empty = np.empty(0, np.uint8)
        all_full = bool((targets.counts == self.header.top_k).all())
        outside = ~targets.among_kept(labels)
        streams = {
            **dict.fromkeys(STREAMS, empty),
            "counts": empty if all_full else to_planes(targets.counts, self._count_width),
            **self._kept.encode(targets),
            "label_logprob": half_planes(np.maximum(targets.label_logprob[outside], LOG_FLOOR)),
            **self._draws.encode(targets),
        }
        return compress(streams)

    def decode(
        self, frames: Mapping[str, object], *, labels: np.ndarray, out: TeacherTargets | None = None
    ) -> TeacherTargets:
        """Targets of one row from its frames (anything with the buffer protocol).

        `out`: targets whose arrays `[N, K]` and `[N]` are filled and returned, for instance slices of a batch; draws
        are new arrays in any case. Raises `StreamDamaged`: a frame whose declared size is not the one that the row's
        own counts require is not decompressed, and a row of more than `MAX_ENTRIES` entries is not decoded.
        """
        return self._decode([frames], [labels.size], labels, out)

    def decode_rows(
        self, rows: Sequence[Mapping[str, object]], *, labels: Sequence[np.ndarray]
    ) -> list[TeacherTargets]:
        """Targets of several rows of together at most `MAX_ENTRIES` entries: faster than `decode` for short rows."""
        if len(rows) == 1:
            return [self.decode(rows[0], labels=labels[0])]
        sizes = [row_labels.size for row_labels in labels]
        shape = (sum(sizes), self.header.top_k)
        common = replace(
            TeacherTargets.empty(shape[0], 0),
            ids=SCRATCH.array("ids", shape, np.int32),
            logprobs=SCRATCH.array("logprobs", shape, np.float32),
        )
        joined = self._decode(rows, sizes, np.concatenate(labels), common)
        stops = np.cumsum(sizes).tolist()
        # Each row gets its own memory: keeping one does not keep its neighbors.
        return [joined.slice(stop - size, stop).copy() for size, stop in zip(sizes, stops, strict=True)]

    def _decode(
        self,
        rows: Sequence[Mapping[str, object]],
        sizes: Sequence[int],
        labels: np.ndarray,
        out: TeacherTargets | None,
    ) -> TeacherTargets:
        """Joined targets of rows of `sizes` positions; `labels [N]`: of all rows."""
        positions, width = labels.size, self.header.top_k
        if positions * width > MAX_ENTRIES:
            raise StreamDamaged(
                "row", found=f"{positions} positions of {width} entries", wanted=f"at most {MAX_ENTRIES}"
            )
        source = Frames(rows, sizes)
        filled = TeacherTargets.empty(positions, width) if out is None else out
        counts = source.counts("counts", width=self._count_width, low=1, high=width, absent=width)
        filled.counts[:] = width if counts is None else counts
        self._kept.decode(source, counts, ids=filled.ids, logprobs=filled.logprobs, log_tail=filled.log_tail)
        draws = self._draws.decode(source)

        # The fastest sum along short rows whose result does not depend on how many there are (that of BLAS does): a row
        # decoded alone or among others has bitwise equal values.
        probs = np.exp(filled.logprobs, out=SCRATCH.array("probs", filled.logprobs.shape, np.float32))
        mass = np.einsum("nk->n", probs) + np.exp(filled.log_tail)
        log_mass = np.log(mass)
        for values, shift in ((filled.logprobs, log_mass[:, None]), (filled.log_tail, log_mass)):
            np.subtract(values, shift, out=values)
            if values.size and values.max() > 0:  # by rounding, where one entry holds all the mass
                np.minimum(values, 0, out=values)
        self._labels(source, filled, labels, log_mass)
        return replace(filled, draw_ids=draws.ids, draw_counts=draws.counts, draw_logprobs=draws.logprobs)

    def label_slack(self, log_tail: np.ndarray) -> np.ndarray:
        """`[N]` nats by which the label log-prob of a decoded position may exceed its log tail: two steps (FORMAT.md,
        "Decoding")."""
        halves = 2.0**-10 * (1 - log_tail)
        return halves + (self._kept.grid.step(log_tail) if isinstance(self._kept, GridEntries) else halves)

    def _labels(self, source: Frames, filled: TeacherTargets, labels: np.ndarray, log_mass: np.ndarray) -> None:
        """Fills `label_logprob`: from the kept entries if the label is among them, else from its stream."""
        places = np.arange(labels.size)
        # argmax finds the first match, which is a used entry: unused entries repeat the first id of their position.
        at_label = np.equal(filled.ids, labels[:, None], out=SCRATCH.array("at_label", filled.ids.shape, np.bool_))
        column = at_label.argmax(axis=1)
        filled.label_logprob[:] = filled.logprobs[places, column]
        outside = np.flatnonzero(~at_label[places, column])
        stored = source.halves("label_logprob", split(outside, source.positions))
        filled.label_logprob[outside] = np.minimum(stored - log_mass[outside], 0)
