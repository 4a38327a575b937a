"""How close the stored values are to the teacher's exact ones: KL by percentile.

The capture keeps about 1,000 positions unquantized, in `faithfulness.parquet`. Each is compared with the stored values
at the same position. All values are in nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, computed_field

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import FileDamaged
from coldstill.storage_schema.faithfulness import FAITHFULNESS_NAME, ExactPosition, storage_kl
from coldstill.storage_schema.rows import MASS_TOLERANCE, TeacherTargets


class Faithfulness(BaseModel):
    """Exact against stored teacher values over the kept ids and the tail, at the sampled positions; KL in nats."""

    model_config = ConfigDict(frozen=True)

    positions: int = Field(ge=1)
    mean_kl: float = Field(description="KL(exact || stored).")
    p50_kl: float
    p90_kl: float
    p99_kl: float
    max_kl: float
    guarantee: float = Field(description="The header's upper bound of the mean KL.")
    top1_agreement: float = Field(
        description="Share of positions where the most probable id is the same; of equal ones, the lowest id counts."
    )
    top1_error: float = Field(description="Mean absolute error, nats, of the log-prob of the exact most probable id.")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def holds(self) -> bool:
        """Whether the sample's mean KL is below the guarantee."""
        return self.mean_kl < self.guarantee


def measure_faithfulness(dataset: Dataset) -> Faithfulness | None:
    """The figures of a dataset, or None if it has no sample. Each shard is opened once; only sampled rows are decoded.

    Raises `FileMissing`, `FileDamaged` if the sample does not fit the dataset, and what `Dataset.row` raises.
    """
    sample = dataset.faithfulness_sample()
    if not sample:
        return None
    kl, agrees, errors = np.array(list(_compare(dataset, sample)), np.float64).T
    p50, p90, p99 = np.percentile(kl, (50, 90, 99)).tolist()
    return Faithfulness(
        positions=len(sample),
        mean_kl=float(kl.mean()),
        p50_kl=p50,
        p90_kl=p90,
        p99_kl=p99,
        max_kl=float(kl.max()),
        guarantee=dataset.header.codec.mean_kl,
        top1_agreement=float(agrees.mean()),
        top1_error=float(errors.mean()),
    )


def _compare(dataset: Dataset, sample: list[ExactPosition]) -> Iterator[tuple[float, bool, float]]:
    """For each position: KL, whether the most probable id is the same, and the error of its log-prob."""
    first_rows = [0, *accumulate(shard.rows for shard in dataset.shards)]
    at: tuple[int, int] | None = None
    for exact in sorted(sample, key=lambda position: position[:3]):
        where = f"{FAITHFULNESS_NAME}: unit {exact.unit}, row {exact.row}, target {exact.target}"
        if exact.unit >= len(dataset.shards) or exact.row >= dataset.shards[exact.unit].rows:
            raise FileDamaged(where, found="a row that the dataset does not have", wanted="a row of the dataset")
        if at != (exact.unit, exact.row):
            at = exact.unit, exact.row
            stored = dataset.row(first_rows[exact.unit] + exact.row).targets
        if exact.target >= stored.positions:
            raise FileDamaged(where, found=f"a row of {stored.positions} targets", wanted="a target of that row")
        _check_mass(exact, where)
        yield storage_kl(exact, stored), *_top1(exact, stored)


def _check_mass(exact: ExactPosition, where: str) -> None:
    """Raise `FileDamaged` unless the values sum to 1, as every row is required to before it is stored."""
    with np.errstate(over="ignore"):
        mass = np.exp(np.append(exact.logprobs, exact.log_tail).astype(np.float64)).sum()
    if not abs(mass - 1) <= MASS_TOLERANCE:
        raise FileDamaged(f"{where}: mass", found=f"{mass:.6g}", wanted=f"1 within {MASS_TOLERANCE}")


def _top1(exact: ExactPosition, stored: TeacherTargets) -> tuple[bool, float]:
    ids = stored.ids[exact.target, : stored.counts[exact.target]]
    logprobs = stored.logprobs[exact.target, : ids.size]
    best = _most_probable(exact.ids, exact.logprobs)
    error = abs(float(logprobs[ids == exact.ids[best]][0]) - float(exact.logprobs[best]))
    return bool(ids[_most_probable(ids, logprobs)] == exact.ids[best]), error


def _most_probable(ids: np.ndarray, logprobs: np.ndarray) -> int:
    return int(np.lexsort((ids, -logprobs))[0])
