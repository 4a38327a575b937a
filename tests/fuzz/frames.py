"""Changes to zstd frames: other content under a right checksum and size, or a frame of another form."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import zstandard

from . import byte_changes

_MAGIC = struct.pack("<I", 0xFD2FB528)


def change(rng: random.Random, frame: bytes) -> bytes:
    """Another frame, or other bytes, in the place of `frame`."""
    return rng.choice(_CHANGES)(rng, frame)


def content_of(frame: bytes) -> bytes:
    """What a sound frame holds; nothing for no frame."""
    return zstandard.decompress(frame) if frame else b""


def _of(content: bytes, *, level: int = 3, checksum: bool = True, size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=size).compress(content)


def _other_content(rng: random.Random, frame: bytes) -> bytes:
    content = byte_changes.change(rng, content_of(frame))
    return _of(content) if content else b""


def _same_size(rng: random.Random, frame: bytes) -> bytes:
    content = bytearray(content_of(frame))
    for _ in range(rng.choice((1, 1, 2, 8))):
        if content:
            content[rng.randrange(len(content))] = rng.choice((0, 1, 2, 254, 255, 127, rng.randrange(256)))
    return _of(bytes(content)) if content else b""


def _filled(rng: random.Random, frame: bytes) -> bytes:
    content = content_of(frame)
    return _of(bytes([rng.choice((0, 1, 8, 255, rng.randrange(256)))]) * len(content)) if content else b""


def _other_make(rng: random.Random, frame: bytes) -> bytes:
    content = content_of(frame)
    return _of(content, level=rng.choice((1, 19, -5)), checksum=rng.random() < 0.3, size=rng.random() < 0.5)


def _lying_size(rng: random.Random, frame: bytes) -> bytes:
    """A frame that declares another size than it has, in a field of 8 bytes, with a window of its own or none."""
    size = rng.choice((*byte_changes.INTERESTING, len(content_of(frame)))) & (1 << 64) - 1
    block = content_of(frame)[:1000]
    return _header(rng, size) + _raw_block(block)


def _header(rng: random.Random, size: int) -> bytes:
    single = rng.random() < 0.5
    window = b"" if single else bytes([rng.choice((0, 100, 171, 248, 255))])  # 255: a window of terabytes
    dictionary = rng.choice((b"", b"", b"\x07\x00\x00\x00"))
    descriptor = 3 << 6 | single << 5 | (3 if dictionary else 0)
    return _MAGIC + bytes([descriptor]) + window + dictionary + struct.pack("<Q", size)


def _raw_block(block: bytes) -> bytes:
    return struct.pack("<I", len(block) << 3 | 1)[:3] + block


def _repeated_byte(rng: random.Random, frame: bytes) -> bytes:
    """The size that is demanded, from one block of one repeated byte."""
    size = len(content_of(frame)) or 1
    declared = rng.choice((size, size, 1 << 27))
    block = struct.pack("<I", min(size, 1 << 17) << 3 | 1 << 1 | 1)[:3] + b"\x05"
    return _header(rng, declared) + block


def _skippable(rng: random.Random, frame: bytes) -> bytes:
    skip = struct.pack("<II", 0x184D2A50 + rng.randrange(16), rng.choice((0, 3, 1 << 30))) + b"abc"
    return rng.choice((skip + frame, frame + skip, skip))


def _several(rng: random.Random, frame: bytes) -> bytes:
    content = content_of(frame)
    half = len(content) // 2
    return rng.choice((frame * 2, _of(content[:half]) + _of(content[half:]), frame + _of(b""), _of(b"") + frame))


def _bytes(rng: random.Random, frame: bytes) -> bytes:
    return byte_changes.change(rng, frame)


def _nothing(rng: random.Random, frame: bytes) -> bytes:
    return rng.choice((b"", b"\0", _of(b""), _of(b"a"), b"\x80\x04\x95."))


_CHANGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _other_content, _same_size, _same_size, _same_size, _filled, _other_make, _lying_size, _repeated_byte, _skippable,
    _several, _bytes, _nothing,
)  # fmt: skip
