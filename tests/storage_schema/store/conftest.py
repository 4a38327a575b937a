"""A bucket of a real S3 protocol server, for tests of object stores."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import fsspec
import pytest

from tests.storage_schema.store.s3_server import S3Server, login, serve

s3_server = pytest.fixture(scope="module")(serve)


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    login(monkeypatch, s3_server)
    name = f"bucket-{secrets.token_hex(4)}"
    fsspec.filesystem("s3").mkdir(name)
    s3_server.forget()
    yield name
    fsspec.get_filesystem_class("s3").clear_instance_cache()
