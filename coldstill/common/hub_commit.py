"""The commit of a model of the Hub, from the path of its files in this machine's cache."""

from __future__ import annotations

import re
from typing import Any

_SNAPSHOT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")


def hub_commit(name: str, revision: str | None = None, *, config: Any = None) -> str | None:
    """The commit at `revision` of the Hub model `name`, whose configuration was loaded before; None if no cached file
    shows it.

    `config`: the loaded configuration. transformers before 5.19 wrote the commit into it.
    """
    if commit := getattr(config, "_commit_hash", None):
        return str(commit)
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    except HFValidationError:  # not a name of the Hub
        return None
    found = _SNAPSHOT.search(path) if isinstance(path, str) else None
    return found[1] if found else None
