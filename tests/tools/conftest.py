"""Fixtures of tests that push and pull."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.tools.hub_stand_in import HubStandIn, serve

hub_server = pytest.fixture(scope="module")(serve)


@pytest.fixture
def hub(hub_server: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    """The stand-in, empty, as the client's endpoint; logged in as somebody who may write."""
    for held in (hub_server.repositories, hub_server.large, hub_server.requests, hub_server.faults):
        held.clear()
    hub_server.ignored, hub_server.quota = "no such file", 1 << 40
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub_server.url + template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", "writer")
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    yield hub_server
    fsspec.get_filesystem_class("hf").clear_instance_cache()


@pytest.fixture
def quick_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A push without a card makes one. The tests of the card hold its plot; here it would take most of the time."""
    monkeypatch.setattr("coldstill.tools.card.card.plot_png", lambda _: b"\x89PNG")
