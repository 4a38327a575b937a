"""The campaigns: which capture is killed, how, and how often.

A campaign consists of rounds. In a round, a capture is started and killed until it is sealed, and then compared with an
unbroken one. The state of a round is its dataset directory, so a campaign that is killed itself can resume.
"""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from coldstill.pipeline.config import CaptureConfig
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.store import Store
from tests.pipeline.capturing import capture_config

from . import clustered, forked, laws
from .bucket import bucket

Way = Literal["forked", "ray", "vllm"]


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """One kind of capture and of kills. `share`: weight in the split of all kills; `changes`: to the settings of
    `tests.pipeline.capturing`."""

    name: str
    way: Way = "forked"
    share: int = 1
    rows: int = 160
    rows_per_unit: int = 4
    on_s3: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


_ON_RAY: dict[str, Any] = {"rows": 200, "rows_per_unit": 5}

FORKED = (
    Campaign(name="workers", share=8),
    Campaign(name="workers, order fast", share=4, changes={"order": "fast", "fidelity": "exact"}),
    Campaign(name="workers, mode generate", share=3, changes={"mode": "generate", "sampling": {"n": 2}}),
    Campaign(name="workers, S3", share=2, rows=60, on_s3=True),
)
RAY = Campaign(name="Ray", way="ray", share=3, **_ON_RAY)
VLLM = Campaign(
    name="Ray, vLLM",
    way="vllm",
    **_ON_RAY,
    changes={"teacher": {"engine": "vllm", "draws": 8, "engine_args": {"enforce_eager": True}}},
)


class Tally(BaseModel):
    """The counts of a campaign so far. `wrong`: a message for each broken law."""

    kills: int = 0
    starts: int = 0
    rounds: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: list[str] = []
    is_open: bool = False
    """Whether a round has begun and not ended."""
    seconds: float = 0.0

    @property
    def is_lawful(self) -> bool:
        """Whether nothing was lost, doubled or otherwise wrong."""
        return not (self.lost or self.doubled or self.wrong)


def shares(campaigns: Sequence[Campaign], kills: int) -> list[int]:
    """The kills of each campaign, split by their shares; they add up to `kills`."""
    total = sum(campaign.share for campaign in campaigns)
    ends = [round(kills * sum(c.share for c in campaigns[:n]) / total) for n in range(len(campaigns) + 1)]
    return [stop - start for start, stop in itertools.pairwise(ends)]


def run(campaign: Campaign, folder: Path, *, kills: int, seed: int, tally: Tally) -> Iterator[Tally]:
    """Run a campaign up to `kills` kills and the end of the last round. Yields the tally after each start."""
    if not Store(folder / "unbroken").exists(MANIFEST_NAME):  # a kill left it unfinished: start over
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        start, root = partial(forked.start), str(folder)
        if campaign.on_s3:
            root, environment, _ = stack.enter_context(bucket())
            start = partial(forked.start, environment=environment)
        elif campaign.way != "forked":
            start = partial(clustered.start, teacher="fake" if campaign.way == "ray" else "real")
        unbroken = _config(campaign, folder, output=str(folder / "unbroken"))
        if tally.kills < kills or tally.is_open:
            _require_unbroken(campaign, unbroken)
        while tally.kills < kills or tally.is_open:
            began = time.monotonic()
            config = _config(campaign, folder, output=f"{root}/round-{tally.rounds}")
            rng = random.Random(f"{seed} {campaign.name} {tally.starts}")
            outcome = start(config, rng, at_most=kills - tally.kills)
            tally.starts += 1
            tally.kills += outcome.killed
            tally.is_open = not outcome.finished
            tally.wrong += [*outcome.wrong, *laws.half_written(Store(config.output))]
            if outcome.finished:
                compared = laws.compare(config.output, unbroken.output)
                tally.lost += compared.lost
                tally.doubled += compared.doubled
                tally.wrong += compared.wrong
                tally.rounds += 1
                if tally.is_lawful:
                    shutil.rmtree(config.output, ignore_errors=True)
            tally.seconds += time.monotonic() - began
            yield tally
            if outcome.wrong:
                return  # the next start might fail in the same way forever


def _require_unbroken(campaign: Campaign, config: CaptureConfig) -> None:
    if Store(config.output).exists(MANIFEST_NAME):
        return
    if campaign.way != "vllm":
        forked.run_unbroken(config)
    elif wrong := clustered.start(config, random.Random(0), at_most=0, teacher="real").wrong:
        raise RuntimeError(f"an unbroken capture failed: {wrong}")


def _config(campaign: Campaign, folder: Path, *, output: str) -> CaptureConfig:
    cluster = {"store_retry_s": 5 if campaign.way == "forked" else 60}
    changes = {"rows_per_unit": campaign.rows_per_unit, "cluster": cluster, **campaign.changes}
    config = capture_config(folder, rows=campaign.rows, **changes)
    return config.model_copy(update={"output": output})
