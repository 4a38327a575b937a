"""Codec `float16`: the targets of one row as named byte streams, one zstd frame each.

In: `TeacherTargets` of a row and its labels. Out: `{stream name: frame}`; an empty stream is an empty value.
Shape letters: `N` target positions of the row, `K` teacher top-k, `S` kept entries of all positions, `R` kept draws.

Integers and halves are little-endian and split into byte planes (all low bytes, then all next bytes), which is what
lets zstd see that high bytes repeat. Decoding subtracts the log of the total mass from every value, so a decoded
position always sums to 1, tail included.
"""

from __future__ import annotations

import numpy as np
import zstandard

from .errors import StreamDamaged
from .header import DatasetHeader
from .rows import LOG_TAIL_FLOOR, TeacherTargets

STREAMS = ("counts", "ids", "logprobs", "log_tail", "label_logprob", "draw_counts", "draw_ids")
"""Order and names of the streams; each is a column of a shard."""

_LEVEL = 3


def encode(targets: TeacherTargets, *, labels: np.ndarray, header: DatasetHeader) -> dict[str, bytes]:
    """Frames of one row. `labels int32 [N]` are the tokens that really follow; their log-prob is stored only where a
    position does not keep the label."""
    kept = targets.kept
    id_bytes = _id_bytes(header.token_count)
    outside = ~label_among_kept(targets, labels)
    all_full = bool((targets.counts == header.top_k).all())
    streams = {
        "counts": np.empty(0, np.uint8) if all_full else _planes(targets.counts.astype("<u2"), 2),
        "ids": _planes(targets.ids[kept].astype("<u4"), id_bytes),
        "logprobs": _half_planes(targets.logprobs[kept]),
        "log_tail": _half_planes(targets.log_tail),
        "label_logprob": _half_planes(targets.label_logprob[outside]),
        "draw_counts": _planes(targets.draw_counts.astype("<u2"), 2)
        if targets.draw_ids.size
        else np.empty(0, np.uint8),
        "draw_ids": _planes(targets.draw_ids.astype("<u4"), id_bytes),
    }
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True)
    return {name: compressor.compress(raw.tobytes()) if raw.size else b"" for name, raw in streams.items()}


def decode(frames: dict[str, bytes], *, labels: np.ndarray, header: DatasetHeader) -> TeacherTargets:
    """Targets of one row from its frames. Raises `StreamDamaged`; no frame is opened before its declared size is the
    one that the row's own counts demand."""
    positions = labels.size
    width = header.top_k
    id_bytes = _id_bytes(header.token_count)
    if frames["counts"]:
        counts = _integers(_open(frames, "counts", 2 * positions), 2)
        _require("counts", counts, low=1, high=width)
    else:
        counts = np.full(positions, width, np.int32)
    total = int(counts.sum(dtype=np.int64))
    kept = np.arange(width) < counts[:, None]

    kept_ids = _integers(_open(frames, "ids", id_bytes * total), id_bytes)
    _require("ids", kept_ids, low=0, high=header.token_count - 1)
    ids = np.empty((positions, width), np.int32)
    ids[kept] = kept_ids
    first = np.broadcast_to(ids[:, :1], ids.shape)
    ids[~kept] = first[~kept]
    logprobs = np.full((positions, width), -np.inf, np.float32)
    logprobs[kept] = _halves(_open(frames, "logprobs", 2 * total), "logprobs")
    log_tail = _halves(_open(frames, "log_tail", 2 * positions), "log_tail")

    if frames["draw_counts"]:
        draw_counts = _integers(_open(frames, "draw_counts", 2 * positions), 2)
        _require("draw_counts", draw_counts, low=0, high=header.draws)
    else:
        draw_counts = np.zeros(positions, np.int32)
    draws = int(draw_counts.sum(dtype=np.int64))
    draw_ids = _integers(_open(frames, "draw_ids", id_bytes * draws), id_bytes)
    _require("draw_ids", draw_ids, low=0, high=header.token_count - 1)

    log_mass = np.log(np.exp(logprobs, dtype=np.float64).sum(1) + np.exp(log_tail, dtype=np.float64)).astype(np.float32)
    logprobs -= log_mass[:, None]
    at_label = (ids == labels[:, None]) & kept
    outside = ~at_label.any(1)
    label_logprob = np.where(at_label, logprobs, -np.inf).max(1, initial=-np.inf).astype(np.float32)
    stored = _halves(_open(frames, "label_logprob", 2 * int(outside.sum())), "label_logprob")
    label_logprob[outside] = np.minimum(stored - log_mass[outside], 0)
    return TeacherTargets(
        ids=ids,
        logprobs=np.minimum(logprobs, 0, out=logprobs),
        counts=counts,
        log_tail=np.clip(log_tail - log_mass, LOG_TAIL_FLOOR, 0),
        label_logprob=label_logprob,
        draw_ids=draw_ids,
        draw_counts=draw_counts,
    )


def label_among_kept(targets: TeacherTargets, labels: np.ndarray) -> np.ndarray:
    """`bool [N]`: whether a position keeps its label."""
    return ((targets.ids == labels[:, None]) & targets.kept).any(1)


def _id_bytes(token_count: int) -> int:
    return 2 if token_count <= 1 << 16 else 3


def _planes(values: np.ndarray, width: int) -> np.ndarray:
    """The `width` low bytes of little-endian `values`, plane by plane: `uint8 [width * n]`."""
    octets = values.view(np.uint8).reshape(values.size, values.itemsize)
    return np.ascontiguousarray(octets[:, :width].T).reshape(-1)


def _half_planes(values: np.ndarray) -> np.ndarray:
    return _planes(np.minimum(values, 0).astype("<f2"), 2)


def _integers(raw: np.ndarray, width: int) -> np.ndarray:
    """`int32 [n]` from `width` byte planes."""
    planes = raw.reshape(width, -1).astype(np.int32)
    value = planes[0]
    for shift in range(1, width):
        value = value | planes[shift] << (8 * shift)
    return value


def _halves(raw: np.ndarray, name: str) -> np.ndarray:
    """`float32 [n]` from two byte planes; finite and not above 0."""
    values = np.ascontiguousarray(raw.reshape(2, -1).T).view("<f2").reshape(-1).astype(np.float32)
    if values.size and not (np.isfinite(values).all() and values.max() <= 0):
        raise StreamDamaged(f"stream {name}", found="a value that is not finite or above 0", wanted="natural logs <= 0")
    return values


def _open(frames: dict[str, bytes], name: str, size: int) -> np.ndarray:
    """`uint8 [size]`: the content of a frame whose declared size must be `size`."""
    frame = frames[name]
    if not frame:
        if size:
            raise StreamDamaged(f"stream {name}", found="nothing", wanted=f"{size} bytes")
        return np.empty(0, np.uint8)
    try:
        declared = zstandard.frame_content_size(frame)
        if declared != size:
            raise StreamDamaged(f"stream {name}", found=f"{declared} bytes declared", wanted=f"{size} bytes")
        content = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise StreamDamaged(f"stream {name}", found=str(error), wanted="one whole zstd frame") from None
    if len(content) != size:
        raise StreamDamaged(f"stream {name}", found=f"{len(content)} bytes", wanted=f"{size} bytes")
    return np.frombuffer(content, np.uint8)


def _require(name: str, values: np.ndarray, *, low: int, high: int) -> None:
    if values.size and (values.min() < low or values.max() > high):
        raise StreamDamaged(f"stream {name}", found=f"{values.min()}..{values.max()}", wanted=f"{low}..{high}")
