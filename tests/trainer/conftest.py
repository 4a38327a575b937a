"""A stand-in for the Hub's client that keeps what is uploaded."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """Uploaded files by repository."""
    pushed: dict[str, dict[str, bytes]] = {}

    def create_repo(self: HfApi, repo_id: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path | str, **_: object) -> Future[None]:
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}
        pushed.setdefault(repo_id, {}).update(files)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return pushed
