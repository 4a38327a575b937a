"""`coldstill split`: one new dataset per part. A row's part depends only on the seed and its sample id."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import JsonValue

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.plan import Unit
from coldstill.tools.errors import InvalidRequest

from .deriving import Derivation, Request, derive, nothing_selected, open_output
from .sources import Sources
from .units import Select, plan_selected

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_EXAMPLE = "for instance --part train=0.95 --part test=0.05"


def split(
    root: str | Path, output: str | Path, *, parts: Mapping[str, float], seed: int = 0, progress: bool = True
) -> dict[str, Dataset]:
    """Split the dataset at `root` into the datasets `output`/NAME; the new datasets by name.

    `parts`: the share of rows of each part. Shares apply to the digests of sample ids, so the number of rows varies by
    chance. Equal sample ids are in the same part, and a row stays in its part when the dataset grows. Rejects are not
    copied. Re-run an interrupted split to resume.

    Raises `InvalidRequest`, `NothingSelected` for a part without rows, and what `open_dataset` and `derive` raise.
    """
    _check_parts(parts)
    sources = Sources([open_dataset(root)])
    header = sources.datasets[0].header.newest()
    names = sorted(parts)
    selections = [_part_selection(parts, name, seed) for name in names]
    outputs = {name: f"{str(output).rstrip('/')}/{name}" for name in names}
    for place in outputs.values():
        open_output(place, sources)

    @cache
    def plans() -> list[list[Unit]]:
        planned = plan_selected(
            sources, selections, rows=range(sources.rows), rows_per_unit=header.rows_per_unit, progress=progress
        )
        for name, units in zip(names, planned, strict=True):
            if not units:
                raise nothing_selected(f"part {name!r}")
        return planned

    made = {}
    for number, name in enumerate(names):
        options: dict[str, JsonValue] = {"parts": dict(sorted(parts.items())), "seed": seed, "part": name}
        derivation = Derivation(
            request=Request(command="split", sources=sources.ids, options=options),
            sources=sources,
            header=header,
            select=selections[number],
            make_plan=partial(_units_of_part, plans, number),
        )
        made[name] = derive(outputs[name], derivation, progress=progress)
    return {name: made[name] for name in parts}


def parse_parts(words: Sequence[str]) -> dict[str, float]:
    """Shares by name from words like `train=0.95`. Raises `InvalidRequest`."""
    parts: dict[str, float] = {}
    for word in words:
        name, _, share = word.partition("=")
        try:
            parts[name] = float(share)
        except ValueError:
            raise InvalidRequest("part", found=repr(word), wanted="NAME=SHARE", fix=_EXAMPLE) from None
    if len(parts) < len(words):
        raise InvalidRequest("parts", found=" ".join(words), wanted="each name once", fix=_EXAMPLE)
    return parts


def part_of(sample_id: str | bytes, *, parts: Mapping[str, float], seed: int = 0) -> str:
    """The part of a row: where the first 8 bytes of sha256("SEED:SAMPLE_ID"), as a share of 2^64, fall among the shares
    of the parts in the order of their names."""
    names = sorted(parts)
    edges = [round(edge * 2**64) for edge in itertools.accumulate(parts[name] for name in names[:-1])]
    data = sample_id.encode() if isinstance(sample_id, str) else sample_id
    digest = hashlib.sha256(f"{seed}:".encode() + data).digest()
    return names[bisect.bisect_right(edges, int.from_bytes(digest[:8]))]


def _units_of_part(plans: Callable[[], list[list[Unit]]], number: int) -> list[Unit]:
    return plans()[number]


def _part_selection(parts: Mapping[str, float], name: str, seed: int) -> Select:
    def select(batch: pa.RecordBatch) -> np.ndarray:
        ids = batch.column("sample_id").cast(pa.binary()).to_pylist()
        return np.fromiter((part_of(each, parts=parts, seed=seed) == name for each in ids), bool, count=len(ids))

    return select


def _check_parts(parts: Mapping[str, float]) -> None:
    if len({name.casefold() for name in parts}) < 2:
        raise InvalidRequest("parts", found=sorted(parts), wanted="at least two different names", fix=_EXAMPLE)
    for name, share in parts.items():
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                "the name of a part", found=repr(name)[:100], wanted="letters, digits, '.', '_' and '-'", fix=_EXAMPLE
            )
        if not 0 < share < 1:
            raise InvalidRequest(f"part {name!r}", found=share, wanted="a share between 0 and 1", fix=_EXAMPLE)
    if len({name.casefold() for name in parts}) < len(parts):
        raise InvalidRequest("parts", found=sorted(parts), wanted="names that differ in more than case", fix=_EXAMPLE)
    if abs(sum(parts.values()) - 1) > 1e-9:
        raise InvalidRequest(
            "parts", found=f"a sum of {sum(parts.values()):g}", wanted="shares that sum to 1", fix=_EXAMPLE
        )
