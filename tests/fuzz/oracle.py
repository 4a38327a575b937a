"""Reads a mutant in every way that the library has, in a child process, and records the outcomes.

In: the folder of a dataset. Out: `Reading`, which JSON can carry. Nothing here decides whether that is right.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.commits import committed_units, read_commit
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.faithfulness import FAITHFULNESS_NAME, sample_from_bytes
from coldstill.storage_schema.plan import PLAN_NAME, plan_from_bytes
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.store import Store
from coldstill.tools.errors import TokenizerUnreadable
from coldstill.tools.inspect.page import page_data
from coldstill.tools.inspect.row_facts import open_row
from coldstill.tools.inspect.terminal import show_dataset, show_row
from coldstill.tools.verify import verify

_MOST_ROWS = 64
_MOST_FINDINGS = 20
_MOST_ENTRIES = 100_000
"""Of a row that is looked at one target at a time."""
_MOST_SHOWN = 16 << 20
_MOST_MEDIA_BYTES = 64 << 20
_TAKEN = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
"""A second list by hand: a name that is added to the product's must be added here, after somebody thought about it."""
_NO_MEMORY = ("MemoryError", "malloc of size", "realloc of size", "bad_alloc", "Allocation error")


@dataclass
class Reading:
    """`rows`, `single`: digests of all rows, read in order and by number; none where that failed.

    `named`: the class of the first named error of each way to read; `unnamed`: anything else that was raised, with its
    traceback; `findings`: what `verify --deep` found; `unlawful`: a law that a row breaks without an error;
    `unbounded`: what a reader took under a name of no tokenizer, or showed beyond its limits.
    """

    rows: str | None = None
    single: str | None = None
    named: dict[str, str] = field(default_factory=dict)
    unnamed: str | None = None
    findings: list[str] | None = None
    unlawful: str | None = None
    unbounded: str | None = None


def read(root: Path) -> Reading:
    """Read a dataset in every way."""
    reading = Reading()
    opened: list[Dataset] = []

    def attempt(way: str, action: Callable[[], object]) -> None:
        try:
            action()
        except ColdstillError as error:
            reading.named.setdefault(way, type(error).__name__)
            if any(mark in str(error) for mark in _NO_MEMORY):
                reading.unnamed = f"{way}: memory ran out\n{error}"
        except Exception:
            reading.unnamed = f"{way}: {traceback.format_exc()}"

    def in_order() -> None:
        reading.rows = _digest(_lawful(reading, opened[0], opened[0].rows()))

    def by_number() -> None:
        dataset = opened[0]
        reading.single = _digest(dataset.row(index) for index in range(min(len(dataset), _MOST_ROWS)))

    def find() -> None:
        findings = verify(root, deep=True, progress=False)
        reading.findings = [finding.error for finding in findings[:_MOST_FINDINGS]]
        if any(mark in finding.message for finding in findings for mark in _NO_MEMORY):
            reading.unnamed = "verify: memory ran out"

    def take_commits() -> None:
        for unit in sorted(committed_units(Store(root))):
            attempt("commits", lambda unit=unit: read_commit(Store(root), unit))

    attempt("open", lambda: opened.append(open_dataset(root)))
    if opened:
        attempt("rows", in_order)
        attempt("single", by_number)
        attempt("tokenizer", lambda: _take_tokenizer(reading, opened[0]))
        attempt("inspect", lambda: _inspect(reading, root))
    attempt("verify", find)
    if (root / PLAN_NAME).is_file():
        attempt("plan", lambda: plan_from_bytes((root / PLAN_NAME).read_bytes(), where=PLAN_NAME))
    if (root / FAITHFULNESS_NAME).is_file():
        attempt("sample", lambda: sample_from_bytes((root / FAITHFULNESS_NAME).read_bytes(), where=FAITHFULNESS_NAME))
    attempt("commits", take_commits)
    return reading


def _take_tokenizer(reading: Reading, dataset: Dataset) -> None:
    files = dataset.tokenizer_files()
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    if (strange := [name for name in files if name not in _TAKEN]) or "auto_map" in settings:
        reading.unbounded = f"taken as files of a tokenizer: {strange or 'auto_map'}"


def _inspect(reading: Reading, root: Path) -> None:
    """Show the first row, of a dataset whose tokenizer the tokenizers library loads: those of `strangers.py`."""
    with suppress(TokenizerUnreadable):
        _show(reading, root, page_data(open_row(root, 0)))


def _show(reading: Reading, root: Path, data: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=100)
    show_dataset(root, console=console)
    show_row(root, 0, console=console)
    page = json.dumps(data)
    if len(console.file.getvalue()) > _MOST_SHOWN or len(page) > _MOST_SHOWN:  # type: ignore[attr-defined]
        reading.unbounded = f"{len(page)} characters on a page"


def _digest(rows: Iterable[CachedRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        targets = row.targets
        digest.update(repr((row.sample_id, row.metadata, row.media)).encode("utf-8", "surrogatepass"))
        for values in (
            row.token_ids, row.target_spans, targets.ids, targets.logprobs, targets.counts, targets.log_tail,
            targets.label_logprob, targets.draw_ids, targets.draw_counts, targets.draw_logprobs,
        ):  # fmt: skip
            digest.update(b"none" if values is None else repr(values.shape).encode() + values.tobytes())
    return digest.hexdigest()


def _lawful(reading: Reading, dataset: Dataset, rows: Iterable[CachedRow]) -> Iterable[CachedRow]:
    """The rows, each held to the laws by other code than verify's. Only what verify passes is held against it."""
    for row in rows:
        broken = _broken_law(dataset, row)
        if broken and reading.unlawful is None:
            reading.unlawful = f"row {row.sample_id!r:.80}: {broken}"
        yield row


def _broken_law(dataset: Dataset, row: CachedRow) -> str | None:
    header, targets = dataset.header, row.targets
    if fault := _broken_law_of_media(dataset, row):
        return fault
    if targets.ids.size > _MOST_ENTRIES:
        return None
    if not 2 <= row.token_ids.size <= header.max_length:
        return "its length"
    if row.token_ids.min() < 0 or row.token_ids.max() >= header.token_count:
        return "a token id"
    wanted = [t for start, stop in row.target_spans.tolist() for t in range(start, stop)]
    if wanted != sorted(set(wanted)) or not wanted or wanted[0] < 0 or wanted[-1] > row.token_ids.size - 2:
        return "its spans"
    place = 0
    for n in range(len(wanted)):
        count = int(targets.counts[n])
        ids = targets.ids[n, :count].tolist()
        logs = np.concatenate((targets.logprobs[n, :count], targets.log_tail[n : n + 1])).astype(np.float64)
        draws = targets.draw_ids[place : place + int(targets.draw_counts[n])].tolist()
        place += len(draws)
        if not 1 <= count <= header.top_k or len(set(ids)) != count:
            return f"ids of target {n}"
        if not all(0 <= one < header.token_count for one in (*ids, *draws)) or set(ids) & set(draws):
            return f"ids or draws of target {n}"
        if len(draws) > header.kept_draws:
            return f"number of draws of target {n}"
        if not np.isfinite(logs).all() or logs.max() > 0 or abs(np.exp(logs).sum() - 1) > 1e-3:
            return f"log-probs of target {n}"
        label = float(targets.label_logprob[n])
        if not label <= 0 or not np.isfinite(label):
            return f"label log-prob of target {n}"
    if place != targets.draw_ids.size:
        return "its draws"
    return None


def _broken_law_of_media(dataset: Dataset, row: CachedRow) -> str | None:
    for number, item in enumerate(row.media):
        try:
            content = dataset.media_content(item)
        except ColdstillError as error:
            return f"medium {number}, which is not read: {type(error).__name__}"
        if len(content) > _MOST_MEDIA_BYTES or hashlib.sha256(content).hexdigest() != item.sha256:
            return f"the content of medium {number}"
        if item.path is not None and not re.fullmatch(r"media/[A-Za-z0-9._-]+", item.path):
            return f"the path of medium {number}"
    settings = (json.loads(dataset.header.to_bytes()).get("about", {}).get("processor") or {}).get("settings", {})
    placeholder = settings.get("image_token_id")
    if type(placeholder) is int:
        found = [place for place, id_ in enumerate(row.token_ids.tolist()) if id_ == placeholder]
        if found != [item.position for item in row.media] or placeholder in row.labels.tolist():
            return "its placeholders"
        starts = {"image/png": b"\x89PNG", "image/gif": b"GIF8"}
        for number, item in enumerate(row.media):
            if item.type in starts and not dataset.media_content(item).startswith(starts[item.type]):
                return f"the type of medium {number}"
    return None
