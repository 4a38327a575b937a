"""`python -m tests.chaos --kills 200 --vllm 20 --seed 0`: runs the kill campaigns and prints a table and one JSON line.

Runs of at least this size are stored as a result. The exit code is 1 where anything was lost, doubled or half written.
The same command resumes a run that was killed itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.common.report import finish

from .campaigns import FORKED, RAY, VLLM, Campaign, Tally, run, shares

STATE_NAME = "state.json"


class State(BaseModel):
    """The size of the run, and the tallies of the campaigns by name."""

    kills: int
    vllm: int
    seed: int
    tallies: dict[str, Tally] = {}
    is_done: bool = False

    @property
    def wanted(self) -> list[tuple[Campaign, int]]:
        """Campaigns and the number of kills of each."""
        others = (*FORKED, RAY)
        return [*zip(others, shares(others, self.kills - self.vllm), strict=True), (VLLM, self.vllm)]


def main(arguments: list[str]) -> int:
    """Run or resume the campaigns, and print the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="total number of kills")
    parser.add_argument("--vllm", type=int, default=20, help="number of kills with real vLLM")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of all kills")
    parser.add_argument("--output", type=Path, default=Path("chaos_output"), help="folder of captures and state")
    chosen = parser.parse_args(arguments)
    if not 0 <= chosen.vllm <= chosen.kills:
        parser.error("--vllm is a part of --kills")
    state = _state(chosen.output, kills=chosen.kills, vllm=chosen.vllm, seed=chosen.seed)
    with tqdm(total=state.kills, desc="chaos", unit=" kills", mininterval=2) as bar:
        for number, (campaign, kills) in enumerate(state.wanted):
            tally = state.tallies.setdefault(campaign.name, Tally())
            bar.set_postfix_str(campaign.name)
            bar.update(tally.kills)
            folder = chosen.output / f"{number}"
            for _ in run(campaign, folder, kills=kills, seed=state.seed, tally=tally):
                _save(chosen.output, state)
                bar.update(sum(each.kills for each in state.tallies.values()) - bar.n)
    state.is_done = True
    _save(chosen.output, state)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(_table(state))
    for name, tally in state.tallies.items():
        for what in tally.wrong:
            console.print(f"{name}: {what}", style="bold red", markup=False, highlight=False)
    quick = state.kills < 200 or state.vllm < 20
    finish("chaos", _summary(state), command=f"make chaos SEED={state.seed}", quick=quick)
    return 0 if all(tally.is_lawful for tally in state.tallies.values()) else 1


def _state(output: Path, *, kills: int, vllm: int, seed: int) -> State:
    """The state of a killed run of the same size and seed; otherwise a new one in an empty folder.

    Files of a campaign that broke a law are evidence and stay.
    """
    path = output / STATE_NAME
    asked = State(kills=kills, vllm=vllm, seed=seed)
    if path.exists():
        found = State.model_validate_json(path.read_bytes())
        if not found.is_done and (found.kills, found.vllm, found.seed) == (kills, vllm, seed):
            return found
        if not all(tally.is_lawful for tally in found.tallies.values()):
            raise SystemExit(
                f"{output}: a law was broken here, see {STATE_NAME}; choose another --output, or delete this folder"
            )
        shutil.rmtree(output)
    elif output.exists() and any(output.iterdir()):
        raise SystemExit(f"{output}: not empty, and no {STATE_NAME} of a campaign in it")
    output.mkdir(parents=True, exist_ok=True)
    _save(output, asked)
    return asked


def _save(output: Path, state: State) -> None:
    part = output / f"{STATE_NAME}.part"
    part.write_text(state.model_dump_json(indent=1))
    os.replace(part, output / STATE_NAME)


def _table(state: State) -> Table:
    table = Table(title=f"Captures that were killed, seed {state.seed}")
    table.add_column("campaign")
    for column in ("kills", "starts", "captures", "rows lost", "rows doubled", "other errors", "minutes"):
        table.add_column(column, justify="right")
    for name, tally in [*state.tallies.items(), ("all", _sum(state))]:
        figures = (tally.kills, tally.starts, tally.rounds, tally.lost, tally.doubled, len(tally.wrong))
        table.add_row(name, *map(str, figures), f"{tally.seconds / 60:.1f}", end_section=name != "all")
    return table


def _sum(state: State) -> Tally:
    total = Tally()
    for tally in state.tallies.values():
        for field in ("kills", "starts", "rounds", "lost", "doubled", "wrong", "seconds"):
            setattr(total, field, getattr(total, field) + getattr(tally, field))
    return total


def _summary(state: State) -> dict[str, Any]:
    total = _sum(state)
    return {
        "kills": total.kills,
        "kills_vllm": state.tallies[VLLM.name].kills,
        "captures": total.rounds,
        "lost": total.lost,
        "doubled": total.doubled,
        "wrong": len(total.wrong),
        "seconds": round(total.seconds, 1),
        "seed": state.seed,
        "campaigns": {name: tally.model_dump(exclude={"is_open"}) for name, tally in state.tallies.items()},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
