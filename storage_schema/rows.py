"""A row in memory: `CachedRow`, its `TeacherTargets`, its `MediaReference`s, and the checks of all three.

Shape letters: `T` tokens of a row, `N` target positions, `K` teacher top-k, `R` kept tail draws of all positions.

THE ALIGNMENT LAW, stated once here and applied once, in the capture: target position `t` is the teacher's distribution
of token `t + 1` given tokens `0..t`. A row of `T` tokens has at most `T - 1` target positions, `0 <= t <= T - 2`.
Nothing is shifted anywhere else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from .errors import InvalidRow, InvalidTargets

LOG_FLOOR = -60.0
"""The least log-prob that is stored; -inf becomes this. e^-60 is zero for any loss, and finite (0 * -inf is not)."""

MASS_TOLERANCE = 1e-3
"""How far the mass of kept ids and tail may be from 1 before encoding: float16 log-probs are off by this much."""

MEDIA_FOLDER = "media"
MAX_MEDIA_BYTES = 64 << 20
MAX_MEDIA = 4096
"""References of one row."""

_MIME_TYPE = re.compile(r"[a-z]+/[a-z0-9][a-z0-9.+-]*")
_MEDIA_PATH = re.compile(rf"{MEDIA_FOLDER}/[A-Za-z0-9_-](?:[A-Za-z0-9._-]{{0,253}}[A-Za-z0-9_-])?")
_RESERVED = re.compile(rf"{MEDIA_FOLDER}/(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)
"""Names that Windows gives to devices."""


@dataclass(frozen=True, kw_only=True)
class TeacherTargets:
    """The teacher's cached distributions at `N` target positions.

    `ids int32 [N, K]`, `logprobs float32 [N, K]`: the kept ids, in no particular order, and the natural log of the full
    softmax at temperature 1. `counts int32 [N]`: how many of the K entries a position keeps (fewer than K where
    `min_prob` drops some); unused entries repeat the position's first id with log-prob -inf. `log_tail float32 [N]`:
    log of the mass outside the kept ids. `label_logprob float32 [N]`: log-prob of the token that follows.

    `draw_ids int32 [R]`, `draw_counts int32 [N]`: draws from outside the kept ids, made as the header says,
    position by position, a multiset. `draw_logprobs float32 [R]`: their log-probs, if they are stored.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray
    log_tail: np.ndarray
    label_logprob: np.ndarray
    draw_ids: np.ndarray
    draw_counts: np.ndarray
    draw_logprobs: np.ndarray | None = None

    @classmethod
    def empty(cls, positions: int, top_k: int) -> TeacherTargets:
        """Uninitialized arrays for `positions` distributions of `top_k` entries, without draws."""
        return cls(
            ids=np.empty((positions, top_k), np.int32),
            logprobs=np.empty((positions, top_k), np.float32),
            counts=np.empty(positions, np.int32),
            log_tail=np.empty(positions, np.float32),
            label_logprob=np.empty(positions, np.float32),
            draw_ids=np.empty(0, np.int32),
            draw_counts=np.zeros(positions, np.int32),
        )

    @property
    def positions(self) -> int:
        """N."""
        return int(self.ids.shape[0])

    @property
    def top_k(self) -> int:
        """K: the width of the arrays; a position may keep fewer."""
        return int(self.ids.shape[1])

    @property
    def kept(self) -> np.ndarray:
        """`bool [N, K]`: which entries are in use."""
        return np.arange(self.top_k) < self.counts[:, None]

    @property
    def draw_offsets(self) -> np.ndarray:
        """`int64 [N + 1]`: draws of position `i` are `draw_ids[offsets[i]:offsets[i + 1]]`."""
        return np.concatenate(([0], np.cumsum(self.draw_counts, dtype=np.int64)))

    def among_kept(self, token_ids: np.ndarray) -> np.ndarray:
        """`bool [N]`: whether position `i` keeps `token_ids[i]`."""
        # An unused entry repeats a kept id: it cannot add a match.
        return (self.ids == token_ids[:, None]).any(1)

    def by_probability(self) -> TeacherTargets:
        """The same targets with the entries of each position sorted by descending probability, ties by id."""
        order = np.lexsort((self.ids, -self.logprobs), axis=1)
        ids, logprobs = np.take_along_axis(self.ids, order, 1), np.take_along_axis(self.logprobs, order, 1)
        return replace(self, ids=np.where(self.kept, ids, ids[:, :1]), logprobs=logprobs)

    def check(self, *, token_count: int) -> None:
        """Raises `InvalidTargets` unless every position is a distribution over ids below `token_count`."""
        if self.positions == 0:
            return
        kept = self.kept
        if self.counts.min() < 1 or self.counts.max() > self.top_k:
            raise InvalidTargets(
                "counts", found=(int(self.counts.min()), int(self.counts.max())), wanted=f"1..{self.top_k}"
            )
        for name, ids in (("ids", self.ids[kept]), ("draw_ids", self.draw_ids)):
            if ids.size and (ids.min() < 0 or ids.max() >= token_count):
                raise InvalidTargets(name, found=f"{ids.min()}..{ids.max()}", wanted=f"0..{token_count - 1}")
        ordered = np.sort(np.where(kept, self.ids, -1 - np.arange(self.top_k)), axis=1)
        if self.top_k > 1 and (np.diff(ordered, axis=1) == 0).any():
            raise InvalidTargets("ids", found="an id kept twice at one position", wanted="distinct ids")
        self._check_logprobs(kept)
        self._check_draws()

    def _check_logprobs(self, kept: np.ndarray) -> None:
        for name, values in (
            ("logprobs", self.logprobs[kept]),
            ("log_tail", self.log_tail),
            ("label_logprob", self.label_logprob),
            ("draw_logprobs", self.draw_logprobs),
        ):
            if values is not None and values.size and not values.max() <= MASS_TOLERANCE:
                raise InvalidTargets(name, found=f"a value of {values.max()}", wanted="natural logs, at most 0")
        mass = np.exp(np.where(kept, self.logprobs, -np.inf), dtype=np.float64).sum(1) + np.exp(
            self.log_tail, dtype=np.float64
        )
        worst = int(np.abs(mass - 1).argmax())
        if abs(mass[worst] - 1) > MASS_TOLERANCE:
            raise InvalidTargets(
                f"mass of position {worst}", found=f"{mass[worst]:.6f}", wanted=f"1 within {MASS_TOLERANCE}"
            )

    def _check_draws(self) -> None:
        if self.draw_counts.min() < 0 or self.draw_counts.sum(dtype=np.int64) != self.draw_ids.size:
            raise InvalidTargets(
                "draw_counts", found=f"{self.draw_counts.sum()} draws", wanted=f"{self.draw_ids.size}, one for each id"
            )
        if not self.draw_ids.size:
            return
        owner = np.repeat(np.arange(self.positions), self.draw_counts)
        # Position and id in one integer: a comparison of every draw with all K entries would take R x K bytes.
        entries = (np.arange(self.positions)[:, None] << 32 | self.ids)[self.kept]
        if np.isin(owner << 32 | self.draw_ids, entries).any():
            raise InvalidTargets(
                "draw_ids", found="a draw among the kept ids of its position", wanted="tail draws only"
            )

    def copy(self) -> TeacherTargets:
        """A deep copy."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        copies: dict[str, Any] = {name: None if array is None else array.copy() for name, array in arrays.items()}
        return TeacherTargets(**copies)

    def slice(self, start: int, stop: int) -> TeacherTargets:
        """The targets of positions `start..stop`, as views."""
        offsets = self.draw_offsets
        return TeacherTargets(
            ids=self.ids[start:stop],
            logprobs=self.logprobs[start:stop],
            counts=self.counts[start:stop],
            log_tail=self.log_tail[start:stop],
            label_logprob=self.label_logprob[start:stop],
            draw_ids=self.draw_ids[offsets[start] : offsets[stop]],
            draw_counts=self.draw_counts[start:stop],
            draw_logprobs=None if self.draw_logprobs is None else self.draw_logprobs[offsets[start] : offsets[stop]],
        )


@dataclass(frozen=True, kw_only=True)
class MediaReference:
    """An image (or other medium) that one placeholder token of a row stands for.

    `position`: index of the placeholder in the row's `token_ids`, where each medium has ONE placeholder; teacher and
    student expand it in their own way. `type`: MIME type. `sha256`: of the content. Either `data` is the content, or
    `path` is a file of the dataset directly in `media/`.
    """

    position: int
    type: str
    sha256: str
    path: str | None = None
    data: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class CachedRow:
    """One sequence and the teacher's targets of it.

    `token_ids int32 [T]`; `target_spans int32 [n, 2]`: ascending, disjoint runs `[start, stop)` of target positions;
    `targets`: their distributions in that order; `metadata`: free JSON of the source row; `media`: one reference for
    each placeholder token of an image.
    """

    sample_id: str
    token_ids: np.ndarray
    target_spans: np.ndarray
    targets: TeacherTargets
    metadata: Mapping[str, Any] = field(default_factory=dict)
    media: tuple[MediaReference, ...] = ()

    @property
    def positions(self) -> np.ndarray:
        """`int64 [N]`: the target positions of the row, ascending."""
        return span_positions(self.target_spans)

    @property
    def labels(self) -> np.ndarray:
        """`int32 [N]`: the token that follows each target position (the alignment law)."""
        return self.token_ids[self.positions + 1]

    def check(
        self,
        *,
        token_count: int,
        label_slack: np.ndarray | float = MASS_TOLERANCE,
        image_token_id: int | None = None,
    ) -> None:
        """Raises `InvalidRow` or `InvalidTargets` unless tokens, spans, targets and media match.

        `label_slack`, nats, scalar or `[N]`: how far the log-prob of a label outside the kept ids may exceed the log
        tail. `image_token_id`: the placeholder of an image, if the header has it.
        """
        check_sequence(self.sample_id, self.token_ids, self.target_spans, token_count=token_count)
        if self.positions.size != self.targets.positions:
            raise InvalidRow(
                f"row {self.sample_id!r}: targets",
                found=f"{self.targets.positions} distributions",
                wanted=f"{self.positions.size}, one per target position",
            )
        self.targets.check(token_count=token_count)
        above = self.targets.label_logprob - self.targets.log_tail - label_slack
        if ((above > 0) & ~self.targets.among_kept(self.labels)).any():
            raise InvalidTargets(
                f"row {self.sample_id!r}: label_logprob",
                found=f"{above.max():.4f} nats too much for a label outside the kept ids",
                wanted="at most the log tail",
            )
        check_media(self.sample_id, self.media, tokens=self.token_ids.size)
        if image_token_id is not None:
            self._check_placeholders(image_token_id)

    def _check_placeholders(self, image_token_id: int) -> None:
        found = np.flatnonzero(self.token_ids == image_token_id).tolist()
        wanted = [item.position for item in self.media]
        if found != wanted:
            raise InvalidRow(
                f"row {self.sample_id!r}: placeholders of images (token {image_token_id})",
                found=f"{len(found)}, at {found[:8]}",
                wanted=f"{len(wanted)}, one for each medium, at {wanted[:8]}",
            )
        if (self.labels == image_token_id).any():
            place = int(self.positions[self.labels == image_token_id][0])
            raise InvalidRow(
                f"row {self.sample_id!r}: target position {place}",
                found=f"the label {image_token_id}, the placeholder of an image",
                wanted="targets whose labels are text",
            )


def check_sequence(sample_id: str, token_ids: np.ndarray, target_spans: np.ndarray, *, token_count: int) -> None:
    """Raises `InvalidRow` unless all ids are below `token_count` and the spans are ascending, disjoint, not empty and
    within the row."""
    if token_ids.ndim != 1 or token_ids.size < 2:
        raise InvalidRow(f"row {sample_id!r}: token_ids", found=f"shape {token_ids.shape}", wanted="at least 2 tokens")
    if token_ids.min() < 0 or token_ids.max() >= token_count:
        raise InvalidRow(
            f"row {sample_id!r}: token_ids",
            found=f"{token_ids.min()}..{token_ids.max()}",
            wanted=f"0..{token_count - 1}",
        )
    edges = np.asarray(target_spans, np.int64)
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.shape[0] == 0:
        raise InvalidRow(f"row {sample_id!r}: target_spans", found=f"shape {edges.shape}", wanted="[n, 2] with n >= 1")
    flat = edges.reshape(-1)
    if flat[0] < 0 or flat[-1] > token_ids.size - 1 or (edges[:, 0] >= edges[:, 1]).any() or (np.diff(flat) < 0).any():
        raise InvalidRow(
            f"row {sample_id!r}: target_spans",
            found=f"{edges[:4].tolist()} of {len(edges)}",
            wanted=f"ascending [start, stop) with 0 <= start < stop <= {token_ids.size - 1}",
        )


def check_media(sample_id: str, media: Sequence[MediaReference], *, tokens: int) -> None:
    """Raises `InvalidRow` unless every reference is complete and its content has the recorded digest."""
    if len(media) > MAX_MEDIA:
        raise InvalidRow(f"row {sample_id!r}: media", found=len(media), wanted=f"at most {MAX_MEDIA}")
    before = -1
    for number, item in enumerate(media):
        where = f"row {sample_id!r}: media {number}"
        if not before < item.position < tokens:
            raise InvalidRow(f"{where}: position", found=item.position, wanted=f"ascending positions below {tokens}")
        before = item.position
        if not _MIME_TYPE.fullmatch(item.type):
            raise InvalidRow(f"{where}: type", found=repr(item.type[:80]), wanted="a MIME type, such as image/png")
        if (item.path is None) == (item.data is None):
            raise InvalidRow(where, found="a path and data, or neither", wanted="one of path and data")
        if item.path is not None and not is_media_path(item.path):
            raise InvalidRow(f"{where}: path", found=repr(item.path[:80]), wanted=f"a file in {MEDIA_FOLDER}/")
        if item.data is not None:
            _check_media_data(where, item.data, item.sha256)


def is_media_path(path: str) -> bool:
    """Whether a file in `media/` can have this name on every system."""
    return _MEDIA_PATH.fullmatch(path) is not None and _RESERVED.fullmatch(path) is None


def _check_media_data(where: str, data: bytes, sha256: str) -> None:
    if len(data) > MAX_MEDIA_BYTES:
        raise InvalidRow(f"{where}: data", found=f"{len(data)} bytes", wanted=f"at most {MAX_MEDIA_BYTES}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise InvalidRow(f"{where}: sha256", found=sha256[:64], wanted=digest)


def spans_from_mask(loss_mask: Sequence[bool] | np.ndarray) -> np.ndarray:
    """`int32 [n, 2]` target spans from a loss mask over TOKENS `[T]`: token `j` is predicted at position `j - 1`.

    The one place where a loss mask is shifted. Nothing precedes token 0, so it gives no target.
    """
    wanted = np.asarray(loss_mask, bool)[1:].astype(np.int8)
    edges = np.diff(np.concatenate(([0], wanted, [0])))
    return np.stack([np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)], axis=1).astype(np.int32)


def span_positions(target_spans: np.ndarray) -> np.ndarray:
    """`int64 [N]`: all positions of the spans, ascending."""
    if len(target_spans) == 1:
        return np.arange(*np.asarray(target_spans, np.int64)[0])
    starts, stops = np.asarray(target_spans, np.int64).reshape(-1, 2).T
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
