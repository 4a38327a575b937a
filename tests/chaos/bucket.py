"""An S3 bucket of this process: a real S3 protocol server on loopback, for processes that it starts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import fsspec

from tests.storage_schema.store.s3_server import S3Server


@contextmanager
def bucket() -> Iterator[tuple[str, dict[str, str], S3Server]]:
    """The bucket's address, the environment variables to reach it, set in this process too, and its server."""
    server = S3Server()
    environment = {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }
    try:
        with mock.patch.dict(os.environ, environment):
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            name = f"chaos-{secrets.token_hex(4)}"  # all servers of a process share their buckets
            fsspec.filesystem("s3").mkdir(name)
            yield f"s3://{name}", environment, server
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        server.stop()
