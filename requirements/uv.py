"""Runs this Python's uv with pip's own settings, so that what pip can install here uv can too.

In:  `python requirements/uv.py {cpu|gpu} ARGUMENTS...`; pip's configuration files and `PIP_*` variables.
Out: uv's exit code. uv's own `UV_*` variables win where they are set.

pip looks for a version in all its indexes at once and takes the best; uv stops at the first index that knows the name.
With an extra index configured for pip, uv is told to do as pip does.

For `cpu`, torch comes from a wheel folder that holds the wanted `+cpu` wheel, or else from PyTorch's own CPU index;
for `gpu`, folders with a `+cpu` wheel are left out.
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
"""pip's option -> the variable that tells uv the same."""

PYTHON_TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
WANTED_TORCH = re.compile(r"^torch==(?P<version>\S+\+cpu)", re.MULTILINE)


def pip_settings(listing: str) -> dict[str, str]:
    """The options of `pip config list`; a variable beats `install`, which beats `global`."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in sections and option in UV_NAMES:
            sections[section][option] = str(ast.literal_eval(value))
    return sections["global"] | sections["install"] | sections[":env:"]


def torch_wheels(folder: str, *, pattern: str) -> bool:
    """Whether a wheel folder holds a torch wheel of this pattern (folders on the web are not asked)."""
    path = Path(folder.removeprefix("file://"))
    return path.is_dir() and any(path.glob(f"torch-{pattern}.whl"))


def uv_environment(settings: Mapping[str, str], *, device: str, torch_version: str) -> dict[str, str]:
    """Variables for uv: pip's settings by uv's names, without those that the user set for uv."""
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
        # This Python's environment, whatever other one the user's shell has activated.
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
