"""Our codec (frames in memory, and a whole shard) and the other codecs as sides of the benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from benchmarks.codec.rivals import Rival
from benchmarks.codec.sides import Case, Side
from benchmarks.inputs.small_language_model import CONTEXT, VOCABULARY
from coldstill.storage_schema.codec import STREAMS, RowCodec
from coldstill.storage_schema.header import Codec, DatasetHeader
from coldstill.storage_schema.header_facts import TeacherFacts
from coldstill.storage_schema.rows import TeacherTargets
from coldstill.storage_schema.shard import read_shard, write_shard

Fidelity = Literal["fine", "coarse", "exact"]

RANKED = ", id ranks"


def our_header(case: Case, fidelity: Fidelity, *, id_ranks: tuple[int, ...] = ()) -> DatasetHeader:
    """The header of a case. Its facts about a teacher are placeholders, which the codec does not read."""
    limits = case.limits
    return DatasetHeader(
        codec=Codec.preset(fidelity, top_k=limits.top_k),
        id_ranks=id_ranks,
        teacher=TeacherFacts(name="small", weights_fingerprint="0", dtype="float32", head_dtype="float32"),
        tokenizer_fingerprint="0" * 64,
        vocab_size=VOCABULARY,
        token_count=VOCABULARY,
        top_k=limits.top_k,
        min_prob=limits.min_prob,
        draws=limits.draws,
        kept_draws=limits.kept_draws,
        draw_seed=0,
        tail="exact",
        loss_on="all",
        max_length=CONTEXT + 1,
        over_long="cut",
        rows_per_unit=max(1, len(case.rows)),
        source_sha256="0" * 64,
    )


def our_sides(case: Case, fidelity: Fidelity, *, id_ranks: tuple[int, ...] = (), shard: bool = True) -> list[Side]:
    """Our codec as sides: from frames in memory and, with `shard`, from a Parquet shard."""
    header = our_header(case, fidelity, id_ranks=id_ranks)
    codec = RowCodec(header)
    labels = [row.labels for row in case.rows]

    def encode() -> list[dict[str, bytes]]:
        return [codec.encode(row.targets, labels=label) for row, label in zip(case.rows, labels, strict=True)]

    def decode(frames: list[dict[str, bytes]]) -> Iterator[TeacherTargets]:
        return (codec.decode(row, labels=label) for row, label in zip(frames, labels, strict=True))

    def sizes(frames: list[dict[str, bytes]]) -> dict[str, int]:
        return {name: sum(len(row[name]) for row in frames) for name in STREAMS}

    name = f"ours, {fidelity}" + (RANKED if id_ranks else "")
    guarantee = header.codec.mean_kl
    sides = [Side(name=name, case=case, encode=encode, decode=decode, sizes=sizes, mean_kl=guarantee)]
    if shard:
        sides.append(
            Side(
                name=f"{name}, shard",
                case=case,
                encode=lambda: write_shard(case.rows, header=header),
                decode=lambda data: (row.targets for row in read_shard(data, header=header, where="shard")),
                sizes=lambda data: {"shard with tokens": len(data)},
                mean_kl=guarantee,
            )
        )
    return sides


def rival_side(case: Case, rival: Rival) -> Side:
    """Another codec as a side, on a case without floor or draws."""
    return Side(
        name=rival.name,
        case=case,
        encode=lambda: rival.encode(case.rows),
        decode=rival.decode,
        sizes=lambda pieces: {"all": sum(len(piece) for piece in pieces)},
    )
