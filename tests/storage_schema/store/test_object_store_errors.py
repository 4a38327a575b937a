"""What an object store refuses, and one that does not answer, has a name that says what to do."""

from __future__ import annotations

import importlib.util
import urllib.request
from pathlib import Path

import fsspec
import pytest

if importlib.util.find_spec("moto") is None:
    pytest.skip("no moto: no S3 server", allow_module_level=True)
pytest.importorskip("s3fs")

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import (
    AccessDenied,
    CredentialsMissing,
    DatasetNotFound,
    StorageFailed,
    StorageFull,
    StoreNotFound,
    StoreUnreachable,
)
from coldstill.storage_schema.store import Store
from coldstill.tools.push import push
from tests.storage_schema.store.s3_server import S3Server, login


def test_no_such_bucket_has_a_name(bucket: str) -> None:
    absent = Store(f"s3://{bucket}-absent/dataset")
    for ask in (
        absent.require_writable,
        lambda: absent.put("a", b""),
        lambda: absent.read("a"),
        lambda: absent.names("a"),
        lambda: open_dataset(absent.url),
    ):
        with pytest.raises(StoreNotFound, match="check the name"):
            ask()
    with pytest.raises(DatasetNotFound):
        open_dataset(f"s3://{bucket}/absent")


def test_no_credentials_have_a_name(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    store = Store(f"s3://{bucket}/dataset")
    for ask in (store.require_writable, lambda: store.read("a"), lambda: store.exists("a")):
        with pytest.raises(CredentialsMissing, match="AWS_PROFILE"):
            ask()


def test_credentials_that_are_wrong_or_lack_the_right_have_names(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    Store(f"s3://{bucket}/dataset").put("a", b"1")
    iam = boto3.client("iam")
    iam.create_user(UserName=bucket)
    key = iam.create_access_key(UserName=bucket)["AccessKey"]

    def enforce(after: str) -> None:
        url = f"{s3_server.url}/moto-api/reset-auth"
        request = urllib.request.Request(url, after.encode(), {"Content-Type": "text/plain"}, method="POST")
        urllib.request.urlopen(request).close()

    enforce("0")
    try:
        login(monkeypatch, s3_server, "AKIAWRONG", "wrong")
        with pytest.raises(CredentialsMissing, match="AWS_PROFILE"):
            Store(f"s3://{bucket}/dataset").put("a", b"2")
        with pytest.raises(AccessDenied, match="AWS_PROFILE"):  # of a HEAD request S3 says no more than 403
            Store(f"s3://{bucket}/dataset").read("a")
        login(monkeypatch, s3_server, key["AccessKeyId"], key["SecretAccessKey"])
        with pytest.raises(AccessDenied, match="request it"):
            Store(f"s3://{bucket}/dataset").read("a")
        with pytest.raises(AccessDenied, match="request it"):
            Store(f"s3://{bucket}/dataset").require_writable()
    finally:
        enforce("inf")


def test_a_refusal_in_the_middle_of_a_file_has_a_name(s3_server: S3Server, bucket: str) -> None:
    store = Store(f"s3://{bucket}/dataset")
    store.put("a", bytes(1 << 16))
    with store.open("a") as file:
        s3_server.fail("GET", "/a", "403 Forbidden", "AccessDenied")
        with pytest.raises(AccessDenied, match="reading a"):
            file.read(1)


def test_a_refusal_in_the_middle_of_a_shard_has_a_name(s3_server: S3Server, bucket: str, tiny_dataset: Path) -> None:
    push(tiny_dataset, f"s3://{bucket}/dataset", progress=False)
    dataset = open_dataset(f"s3://{bucket}/dataset")
    s3_server.fail("GET", dataset.shards[0].file.name, "403 Forbidden", "AccessDenied", times=9)
    with pytest.raises(AccessDenied, match="reading shards"):
        dataset.row(0)


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        ("507 Insufficient Storage", "XMinioStorageFull", StorageFull),
        ("405 Method Not Allowed", "MethodNotAllowed", StorageFailed),
        ("400 Bad Request", "SomethingNew", StorageFailed),
        ("403 Forbidden", "ExpiredToken", CredentialsMissing),
    ],
)
def test_a_refused_write_has_a_name(
    s3_server: S3Server, bucket: str, status: str, code: str, error: type[StorageFailed]
) -> None:
    s3_server.fail("PUT", "/refused", status, code, times=9)
    with pytest.raises(error, match="writing refused"):
        Store(f"s3://{bucket}/dataset").put("refused", b"1")


def test_a_store_that_does_not_answer_has_a_name(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StoreUnreachable, match="check the network"):
        Store(f"s3://{bucket}/dataset").read("a")
