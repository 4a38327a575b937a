"""Slow, independent writers of other tools' files, and a teacher whose log-probs they hold.

Everything here is written from the public formulas and works on one position at a time: it shares no code with the
readers that it tests.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

VOCABULARY = 200
ARCEE_128 = {
    "d": VOCABULARY,
    "k": 128,
    "exact_k": 16,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}
ARCEE_50 = {**ARCEE_128, "k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]}
ALL_EXACT = {**ARCEE_128, "k": 8, "exact_k": 8, "exact_dtype": "float32", "polynomial_terms": None}
LEGACY = {"vocab_size": VOCABULARY, "k": 40, "exact_k": 12, "polynomial_degree": 4}


class Sequence(NamedTuple):
    """`tokens [T]`; `logprobs float64 [T, V]`: row `t` is the teacher's distribution of token `t + 1` given `0..t`."""

    tokens: np.ndarray
    logprobs: np.ndarray


def sequences(count: int, *, seed: int = 0, vocabulary: int = VOCABULARY, length: int = 24) -> list[Sequence]:
    """Texts that a random bigram teacher wrote, so that its predictions of the next token are true."""
    rng = np.random.default_rng(seed)
    logits = 2.5 * rng.standard_normal((vocabulary, vocabulary))
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    made = []
    for _ in range(count):
        tokens = [int(rng.integers(vocabulary))]
        while len(tokens) < length:
            tokens.append(int(rng.choice(vocabulary, p=np.exp(logprobs[tokens[-1]]))))
        made.append(Sequence(np.array(tokens), logprobs[tokens]))
    return made


def top(logprobs: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    """The k most probable ids of one position and their log-probs."""
    order = np.argsort(-logprobs, kind="stable")[:k]
    return order.tolist(), logprobs[order].tolist()


def float_bytes(value: float, dtype: str) -> bytes:
    """A little-endian float; bfloat16 is the upper half of a float32, rounded to even."""
    if dtype != "bfloat16":
        return struct.pack({"float16": "<e", "float32": "<f", "float64": "<d"}[dtype], value)
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF)


def as_stored(value: float, dtype: str) -> float:
    """`value` as the type holds it."""
    data = float_bytes(value, dtype)
    if dtype != "bfloat16":
        return float(struct.unpack({"float16": "<e", "float32": "<f", "float64": "<d"}[dtype], data)[0])
    return float(struct.unpack("<f", b"\0\0" + data)[0])


def bit_stream(numbers: list[int], bits: int) -> bytes:
    """Numbers end to end, highest bit first, filled up with zeros to a byte."""
    text = "".join(format(number, f"0{bits}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def encode_position(values: list[float], config: dict[str, Any]) -> tuple[bytes, list[float]]:
    """DistillKit's distribution quantization of one position's descending log-probs: bytes, and what they mean."""
    if config["delta_encoding"]:
        values = [values[0], *(b - a for a, b in itertools.pairwise(values))]
    exact = config["exact_k"]
    data = b"".join(float_bytes(value, config["exact_dtype"]) for value in values[:exact])
    means = [as_stored(value, config["exact_dtype"]) for value in values[:exact]]
    rest = np.array(values[exact:])
    terms = config["polynomial_terms"] or []
    curve = np.zeros(rest.size)
    if terms and rest.size:
        points = np.linspace(0, 1, rest.size) if config.get("normalize_t") else np.arange(rest.size)
        columns = np.stack([np.sqrt(points) if term == "sqrt" else points**term for term in terms], axis=1)
        solved = np.linalg.lstsq(columns, rest, rcond=None)[0]
        data += b"".join(float_bytes(one, config["term_dtype"]) for one in solved)
        curve = columns @ [as_stored(one, config["term_dtype"]) for one in solved]
    residuals, first = rest - curve, 0
    for one in config["residual_bins"]:
        bits, part = one["element_bits"], slice(first, first + one["num_elements"])
        limit = 1 if bits == 1 else 2 ** (bits - 1)
        scale = as_stored(float(np.abs(residuals[part]).max()) / limit, one["scale_dtype"])
        if bits == 1:
            levels = [int(value > 0) for value in residuals[part]]
            curve[part] += [(2 * level - 1) * scale for level in levels]
        else:
            levels = [min(max(round(value / scale), -limit), limit - 1) + limit for value in residuals[part]]
            curve[part] += [(level - limit) * scale for level in levels]
        data += float_bytes(scale, one["scale_dtype"]) + bit_stream(levels, bits)
        first += one["num_elements"]
    means += curve.tolist()
    return data, list(np.cumsum(means)) if config["delta_encoding"] else means


def encode_legacy(values: list[float], config: dict[str, Any]) -> tuple[list[float], list[float], list[float]]:
    """The older compressor's exact values and coefficients of one position, and what they mean."""
    exact = [as_stored(value, "float16") for value in values[: config["exact_k"]]]
    ranks = np.arange(1.0, config["k"] - config["exact_k"] + 1)
    sign = -1 if config.get("invert_polynomial", True) else 1
    columns = [ranks ** (sign * power) for power in range(config["polynomial_degree"] + 1)]
    columns += [np.sqrt(ranks)] if config.get("with_sqrt_term") else []
    solved = np.linalg.lstsq(np.stack(columns, axis=1), np.array(values[config["exact_k"] :]), rcond=None)[0]
    solved = [as_stored(one, "float32") for one in solved]
    return exact, solved, exact + list(np.stack(columns, axis=1) @ solved)


def words(numbers: list[int], bits: int) -> list[int]:
    """Numbers in 64-bit words, the first in the lowest bits, none across the end of a word."""
    each = 64 // bits
    runs = [numbers[start : start + each] for start in range(0, len(numbers), each)]
    return [sum(number << bits * place for place, number in enumerate(run)) for run in runs]


def distillkit_row(sequence: Sequence, config: dict[str, Any], *, last: bool = False) -> dict[str, Any]:
    """A row as the capture writes it: `T - 1` distributions, or `T` with the `last` one."""
    row: dict[str, Any] = {"input_ids": sequence.tokens.tolist()}
    entries = [top(one, config["k"]) for one in sequence.logprobs[: None if last else -1]]
    if "polynomial_degree" in config:
        bits = math.ceil(math.log2(config["vocab_size"]))
        encoded = [encode_legacy(values, config) for _, values in entries]
        row["packed_indices"] = [words(ids, bits) for ids, _ in entries]
        row["exact_values"] = [exact for exact, _, _ in encoded]
        row["coeffs"] = [coefficients for _, coefficients, _ in encoded]
    else:
        bits = math.ceil(math.log2(config["d"]))
        row["compressed_logprobs"] = [list(encode_position(values, config)[0]) for _, values in entries]
        row["bytepacked_indices"] = [list(bit_stream(ids, bits)) for ids, _ in entries]
    return row


_NESTED = {
    "compressed_logprobs": pa.uint8(),
    "bytepacked_indices": pa.uint8(),
    "packed_indices": pa.uint64(),
    "exact_values": pa.float32(),
    "coeffs": pa.float32(),
}


def write_distillkit(folder: Path, rows: list[dict[str, Any]], config: dict[str, Any] | None, *, per_file: int) -> Path:
    """A capture folder: `data_0.parquet`, `data_1.parquet`, ... and the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    kinds = {name: pa.list_(pa.list_(_NESTED[name])) for name in rows[0] if name in _NESTED}
    schema = pa.schema(
        [(name, kinds.get(name, pa.list_(pa.uint64() if name == "input_ids" else pa.int64()))) for name in rows[0]]
    )
    for file, start in enumerate(range(0, len(rows), per_file)):
        table = pa.Table.from_pylist(rows[start : start + per_file], schema=schema)
        pq.write_table(table, folder / f"data_{file}.parquet", row_group_size=max(per_file // 2, 1))
    return folder


def prepared_row(sequence: Sequence, k: int, *, predicts: str = "next", targets_from: int = 1) -> dict[str, Any]:
    """A row as axolotl's preprocessing shapes it, but with log-probs of the full softmax."""
    length = sequence.tokens.size
    blank = (list(range(k)), [-math.inf] * k, [0] * k)
    lists = [blank] * length
    for token in range(targets_from, length):
        ids, values = top(sequence.logprobs[token - 1], k)
        lists[token - 1 if predicts == "next" else token] = (ids, values, [1] * k)
    return {
        "input_ids": sequence.tokens.tolist(),
        "labels": [-100] * targets_from + sequence.tokens[targets_from:].tolist(),
        "target_token_ids": [ids for ids, _, _ in lists],
        "target_logprobs": [values for _, values, _ in lists],
        "target_mask": [mask for _, _, mask in lists],
    }


def raw_row(sequence: Sequence, k: int, *, version: int, answer: int) -> dict[str, Any]:
    """A row as an engine's log-probs of the last `answer` tokens are stored, before axolotl's preprocessing."""
    entries = [top(one, k) for one in sequence.logprobs[-answer - 1 : -1]]
    row: dict[str, Any] = {"input_ids": sequence.tokens.tolist()}
    if version == 1:
        row["logprobs"] = [
            [{"token": f"token_id:{i}", "logprob": x, "rank": 1} for i, x in zip(ids, values, strict=True)]
            for ids, values in entries
        ]
    else:
        row["logprobs"] = [values for _, values in entries]
        row["target_token_ids"] = [ids for ids, _ in entries]
    return row


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object per line, infinities as Python writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
