"""A reader of Thrift's compact protocol, for the footers and page headers of Parquet files.

A struct becomes a dictionary by field number, a list a list, a number an integer, text bytes. The reader is stricter
than Arrow's, so that both read the same values: field numbers are distinct and have at most 15 bits.
"""

from __future__ import annotations

from typing import Any

_MAX_DEPTH = 12
_TRUE, _FALSE, _BYTE, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 6, 7, 8, 9, 10, 12

Fields = dict[int, Any]


def read_struct(data: bytes, place: int = 0) -> tuple[Fields, int]:
    """The struct at offset `place` of `data`, and the offset of its end.

    Raises `IndexError` if `data` ends too early, `ValueError` if the protocol is violated.
    """
    return _struct(data, place, 0)


def _struct(data: bytes, place: int, depth: int) -> tuple[Fields, int]:
    if depth > _MAX_DEPTH:
        raise ValueError("values nested too deep")
    fields: Fields = {}
    number = 0
    while head := data[place]:
        place += 1
        kind = head & 15
        if head >> 4:
            number += head >> 4
        else:
            number, place = _integer(data, place)
        if number in fields or not 0 <= number < 1 << 15:
            raise ValueError(f"field {number} is duplicate or out of bounds")
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], place = _value(data, place, kind, depth)
    return fields, place + 1


def _value(data: bytes, place: int, kind: int, depth: int) -> tuple[Any, int]:
    if _BYTE < kind <= _I64:
        byte = data[place]
        return (byte >> 1 ^ -(byte & 1), place + 1) if byte < 128 else _integer(data, place)
    if kind == _STRUCT:
        return _struct(data, place, depth + 1)
    if kind == _BINARY:
        size, place = _varint(data, place)
        return _take(data, place, size)
    if kind in (_LIST, _SET):
        return _list(data, place, depth + 1)
    if kind == _DOUBLE:
        return _take(data, place, 8)
    if kind in (_TRUE, _FALSE, _BYTE):  # a boolean has its own byte only inside a list
        return data[place], place + 1
    raise ValueError(f"type {kind}")


def _list(data: bytes, place: int, depth: int) -> tuple[list[Any], int]:
    if depth > _MAX_DEPTH:
        raise ValueError("values nested too deep")
    head = data[place]
    count, place = (head >> 4, place + 1) if head >> 4 < 15 else _varint(data, place + 1)
    if count > len(data) - place:  # a value has at least one byte
        raise IndexError("the end of the data")
    values = []
    for _ in range(count):
        value, place = _value(data, place, head & 15, depth)
        values.append(value)
    return values, place


def _take(data: bytes, place: int, count: int) -> tuple[bytes, int]:
    if place + count > len(data):
        raise IndexError("the end of the data")
    return data[place : place + count], place + count


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _integer(data: bytes, place: int) -> tuple[int, int]:
    value, place = _varint(data, place)
    return value >> 1 ^ -(value & 1), place
