"""An S3 bucket for one test: a real S3 protocol server on loopback."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest

from tests.storage_schema.store.s3_server import S3Server


@contextmanager
def s3_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, S3Server]]:
    """Its address, also for processes that the test starts, and its server."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None:
        pytest.skip("no moto: no S3 server")
    server = S3Server()
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    name = f"bucket-{secrets.token_hex(4)}"
    fsspec.filesystem("s3").mkdir(name)
    try:
        yield f"s3://{name}", server
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        server.stop()
