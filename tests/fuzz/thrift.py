"""Thrift's compact protocol, read into a tree that can be changed and written again (Parquet's footers and pages).

Independent of `storage_schema/thrift.py`, which cannot write and rejects more.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)


@dataclass
class Field:
    """A field of a struct: its number, type and value (an int, float, bytes, `Items` or `Struct`)."""

    number: int
    kind: int
    value: Any


@dataclass
class Struct:
    """Fields in the order in which they are written."""

    fields: list[Field] = field(default_factory=list)

    def get(self, number: int) -> Any:
        """The value of a field; none where there is no such field."""
        return next((item.value for item in self.fields if item.number == number), None)

    def set(self, number: int, value: Any, kind: int = I64) -> None:
        """Change a field, or add it."""
        for item in self.fields:
            if item.number == number:
                item.value = value
                return
        self.fields.append(Field(number, kind, value))
        self.fields.sort(key=lambda item: item.number)


@dataclass
class Items:
    """A list or set and the type of its items."""

    kind: int
    values: list[Any]


def read_struct(data: bytes, place: int = 0) -> tuple[Struct, int]:
    """The struct at `place` and where it ends."""
    reader = _Reader(data, place)
    return reader.struct(), reader.place


def write_struct(value: Struct) -> bytes:
    """The bytes of a struct. Numbers that are too large for their type are written as they are."""
    out = bytearray()
    _write_struct(out, value)
    return bytes(out)


def all_fields(root: Struct) -> list[tuple[Struct, Field]]:
    """Every field of the tree with the struct that holds it."""
    found = []
    for item in root.fields:
        found.append((root, item))
        for inner in _structs_in(item.value):
            found += all_fields(inner)
    return found


def _structs_in(value: Any) -> list[Struct]:
    if isinstance(value, Struct):
        return [value]
    if isinstance(value, Items):
        return [inner for item in value.values for inner in _structs_in(item)]
    return []


class _Reader:
    def __init__(self, data: bytes, place: int):
        self.data, self.place = data, place

    def struct(self) -> Struct:
        fields = []
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            kind = head & 15
            fields.append(Field(number, kind, None if kind in (TRUE, FALSE) else self._value(kind)))
        return Struct(fields)

    def _value(self, kind: int) -> Any:
        if kind in (TRUE, FALSE, BYTE):
            return self._byte()
        if kind in (I16, I32, I64):
            return self._zigzag()
        if kind == DOUBLE:
            return struct.unpack("<d", self._take(8))[0]
        if kind == BINARY:
            return self._take(self._varint())
        if kind in (LIST, SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            return Items(head & 15, [self._value(head & 15) for _ in range(count)])
        if kind == STRUCT:
            return self.struct()
        raise ValueError(f"type {kind}")

    def _take(self, count: int) -> bytes:
        taken = self.data[self.place : self.place + count]
        if len(taken) != count:
            raise ValueError("the end of the data")
        self.place += count
        return taken

    def _byte(self) -> int:
        return self._take(1)[0]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def _zigzag(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)


def _write_struct(out: bytearray, value: Struct) -> None:
    before = 0
    for item in value.fields:
        step = item.number - before
        before = item.number
        if 0 < step < 16:
            out.append(step << 4 | item.kind)
        else:
            out.append(item.kind)
            _write_zigzag(out, item.number)
        if item.kind not in (TRUE, FALSE):
            _write_value(out, item.kind, item.value)
    out.append(0)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    if kind in (TRUE, FALSE, BYTE):
        out.append(int(value) & 255)
    elif kind in (I16, I32, I64):
        _write_zigzag(out, int(value))
    elif kind == DOUBLE:
        out += struct.pack("<d", value)
    elif kind == BINARY:
        _write_varint(out, len(value))
        out += value
    elif kind in (LIST, SET):
        count = len(value.values)
        out.append(min(count, 15) << 4 | value.kind)
        if count >= 15:
            _write_varint(out, count)
        for item in value.values:
            _write_value(out, value.kind, item)
    elif kind == STRUCT:
        _write_struct(out, value)
    else:
        raise ValueError(f"type {kind}")


def _write_zigzag(out: bytearray, value: int) -> None:
    _write_varint(out, (value << 1 ^ value >> 63) & (1 << 64) - 1)


def _write_varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
