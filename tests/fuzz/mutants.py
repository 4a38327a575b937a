"""Mutants: the files of a changed dataset, a pure function of the campaign's seed and the mutant's number.

Even numbers are UNSEALED (bytes are changed, digests are not), odd ones RESEALED (all digests and checksums are made
right again, so that the change reaches the readers behind them). Every sixteenth is what a stranger would send.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coldstill.storage_schema.faithfulness import FAITHFULNESS_NAME
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.plan import PLAN_NAME

from . import byte_changes, headers, json_text, pages, shard_rows, strangers, tables
from .bases import Base
from .tree import Tree

TOKENIZER = "tokenizer/tokenizer.json"
Change = Callable[[random.Random, Tree, Sequence[Base]], None]


@dataclass(frozen=True)
class Mutant:
    """A changed dataset: `base` it was made of, `kind` of change, `files` as they lie in its folder."""

    base: Base
    kind: str
    resealed: bool
    files: dict[str, bytes]


def mutant(seed: int, number: int, bases: Sequence[Base]) -> Mutant:
    """Mutant number `number` of the campaign with `seed`."""
    rng = random.Random(f"{seed} {number}")
    base = rng.choice(bases)
    resealed = number % 2 == 1
    kinds = _OF_STRANGERS if number % 16 == 15 else _RESEALED if resealed else _UNSEALED
    kind = rng.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
    tree = Tree(base.files)
    kinds[kind][1](rng, tree, bases)
    return Mutant(base, kind, resealed, tree.files)


def _bytes_of(*names: str) -> Change:
    def run(rng: random.Random, tree: Tree, bases: Sequence[Base]) -> None:
        name = rng.choice(tree.named(*names))
        tree.files[name] = byte_changes.change(rng, tree.files[name])

    return run


def _json_of(*names: str) -> Change:
    def run(rng: random.Random, tree: Tree, bases: Sequence[Base]) -> None:
        name = rng.choice(tree.named(*names))
        tree.files[name] = json_text.change(rng, tree.files[name])

    return run


def _resealed(change: Change) -> Change:
    def run(rng: random.Random, tree: Tree, bases: Sequence[Base]) -> None:
        change(rng, tree, bases)
        tree.reseal()

    return run


def _parquet(change: Callable[[random.Random, bytes], bytes], *names: str) -> Change:
    def run(rng: random.Random, tree: Tree, bases: Sequence[Base]) -> None:
        name = rng.choice(tree.named(*names))
        tree.files[name] = change(rng, tree.files[name])

    return _resealed(run)


def _tree(change: Callable[[random.Random, Tree], None]) -> Change:
    return _resealed(lambda rng, tree, bases: change(rng, tree))


def _rows(change: Callable[[random.Random, shard_rows.Rows], None]) -> Change:
    """Rows of a shard changed; the manifest's counts follow more often than not."""

    def run(rng: random.Random, tree: Tree, bases: Sequence[Base]) -> None:
        shard = rng.randrange(len(tree.named("shards/")))
        name = tree.named("shards/")[shard]
        rows = shard_rows.rows_of(tree.files[name])
        change(rng, rows)
        header = shard_rows.header_of(tree.files[name])
        tree.files[name] = shard_rows.write_rows(rows, header=header, group_rows=rng.choice((1, 2, 1024)))
        tree.reseal()
        if rng.random() < 0.8:
            tokens = sum(len(row["token_ids"]) for row in rows)
            spans = [row["target_spans"] for row in rows]
            targets = sum(b - a for flat in spans for a, b in zip(flat[::2], flat[1::2], strict=False))
            tree.recount(shard, rows=len(rows), tokens=tokens, targets=max(targets, 0))

    return run


def _files(rng: random.Random, tree: Tree, bases: Sequence[Base]) -> None:
    """A file gone, empty, in another's place, or another dataset's."""
    first, second = rng.choice(sorted(tree.files)), rng.choice(sorted(tree.files))
    other = rng.choice(bases).files
    action = rng.randrange(5)
    if action == 0:
        del tree.files[first]
    elif action == 1:
        tree.files[first] = b""
    elif action == 2:
        tree.files[first], tree.files[second] = tree.files[second], tree.files[first]
    elif action == 3:
        tree.files[first] = other.get(first, b"\x80\x04\x95\x00.")
    else:
        name = rng.choice(
            ("commits/000009.json", "commits/x.json", "shards/000009-0.parquet", "a.pkl", "commits/²", "commits/².json")
        )
        tree.files[name] = tree.files[first]


def _shards_of_another(rng: random.Random, tree: Tree, bases: Sequence[Base]) -> None:
    other = rng.choice(bases).files
    theirs = [data for name, data in other.items() if name.startswith("shards/")]
    tree.files[rng.choice(tree.named("shards/"))] = rng.choice(theirs)


_UNSEALED: dict[str, tuple[float, Change]] = {
    "bytes of a shard": (40, _bytes_of("shards/")),
    "bytes of the manifest": (12, _bytes_of(MANIFEST_NAME)),
    "bytes of the header": (10, _bytes_of(HEADER_NAME)),
    "bytes of a commit record": (8, _bytes_of("commits/")),
    "bytes of plan and sample": (10, _bytes_of(PLAN_NAME, FAITHFULNESS_NAME)),
    "bytes of other files": (6, _bytes_of("tokenizer/", "rejects/", "media/")),
    "JSON of the header": (6, _json_of(HEADER_NAME)),
    "files": (8, _files),
}
_RESEALED: dict[str, tuple[float, Change]] = {
    "frames": (14, _rows(shard_rows.change_frame)),
    "values of rows": (14, _rows(shard_rows.change)),
    "headers that lie": (10, _tree(headers.lie)),
    "any field of headers": (6, _tree(headers.lie_with_any_field)),
    "footers that disagree": (3, _tree(headers.disagree)),
    "pages of a shard": (16, _parquet(pages.change, "shards/")),
    "tables of a shard": (8, _parquet(tables.change, "shards/")),
    "pages of plan and sample": (6, _parquet(pages.change, PLAN_NAME, FAITHFULNESS_NAME)),
    "tables of plan and sample": (3, _parquet(tables.change, PLAN_NAME, FAITHFULNESS_NAME)),
    "bytes of any file": (5, _resealed(_bytes_of(""))),
    "JSON of the manifest": (8, _json_of(MANIFEST_NAME)),
    "JSON of a commit record": (6, _json_of("commits/")),
    "JSON of the tokenizer": (2, _resealed(_json_of(TOKENIZER))),
    "shards of another dataset": (1, _resealed(_shards_of_another)),
}
_OF_STRANGERS: dict[str, tuple[float, Change]] = {
    "names that would be written": (3, _tree(strangers.plant_a_file)),
    "settings that name code": (1, _tree(strangers.name_code)),
    "tokens that multiply": (2, _tree(strangers.lengthen_tokens)),
    "texts that multiply": (2, _tree(strangers.lengthen_texts)),
}
