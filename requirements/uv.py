"""Runs this Python's uv with pip's settings, so that uv can install whatever pip can.

Usage: `python requirements/uv.py {cpu|gpu} ARGUMENTS...`. Reads pip's configuration files and `PIP_*` variables, and
exits with uv's code. `UV_*` variables that the user has set take precedence.

pip takes the best version from all indexes; uv stops at the first index that has the package. If pip has an extra
index, uv is set to behave like pip.

With `cpu`, torch comes from a wheel folder that holds the required `+cpu` wheel, otherwise from PyTorch's CPU index.
With `gpu`, folders with a `+cpu` wheel are left out.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "cert": "SSL_CERT_FILE",
}
"""pip's option -> uv's variable for the same setting."""

PYTHON_TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
WANTED_TORCH = re.compile(r"^torch==(?P<version>\S+\+cpu)", re.MULTILINE)


def pip_settings(listing: str) -> dict[str, str]:
    """The options of `pip config list`. A variable overrides `install`, which overrides `global`."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in sections and option in UV_NAMES:
            sections[section][option] = str(ast.literal_eval(value))
    return sections["global"] | sections["install"] | sections[":env:"]


def torch_wheels(folder: str, *, pattern: str) -> bool:
    """Whether a local wheel folder holds a torch wheel of this pattern; remote folders are not read."""
    path = Path(folder.removeprefix("file://"))
    return path.is_dir() and any(path.glob(f"torch-{pattern}.whl"))


def uv_environment(settings: Mapping[str, str], *, device: str, torch_version: str) -> dict[str, str]:
    """pip's settings as uv's variables, without those that the user has set for uv."""
    wanted = {UV_NAMES[option]: " ".join(value.split()) for option, value in settings.items()}
    folders = settings.get("find-links", "").split()
    if device == "gpu":
        # `==2.13.0` also accepts `2.13.0+cpu`, and prefers it.
        folders = [folder for folder in folders if not torch_wheels(folder, pattern="*+cpu-*")]
    elif not any(torch_wheels(folder, pattern=f"{torch_version}-{PYTHON_TAG}-*") for folder in folders):
        wanted["UV_TORCH_BACKEND"] = "cpu"
    wanted["UV_FIND_LINKS"] = ",".join(folders)
    if "UV_INDEX" in wanted:
        wanted["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {name: value for name, value in wanted.items() if value and name not in os.environ} | {
        # This Python's environment, even if the shell has activated another one.
        "UV_PYTHON": sys.executable
    }


def main(arguments: Sequence[str]) -> int:
    device, *rest = arguments
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    pins = (Path(__file__).parent / "cpu.in").read_text()
    version = WANTED_TORCH.search(pins)
    if version is None:
        raise SystemExit("requirements/cpu.in: no line torch==VERSION+cpu")
    environment = uv_environment(pip_settings(listing), device=device, torch_version=version["version"])
    return subprocess.run([sys.executable, "-m", "uv", *rest], env=os.environ | environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
