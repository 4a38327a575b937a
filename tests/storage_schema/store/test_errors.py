"""Every failure of a store has a named error with a fix: real exceptions of the clients, made without a network."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.errors import (
    AccessDenied,
    CredentialsMissing,
    InvalidRow,
    StorageFailed,
    StorageFull,
    StoreNotFound,
    StoreUnreachable,
    named_errors,
)


def raised(make: Callable[[], Exception], url: str, *, writes: bool = False) -> BaseException:
    with pytest.raises(Exception) as caught, named_errors(url, "reading x", writes=writes):
        raise make()
    return caught.value


def google(status: int, message: str) -> Exception:
    retry = pytest.importorskip("gcsfs.retry")
    with pytest.raises(Exception) as caught:
        retry.validate_response(status, f'{{"error": {{"message": "{message}"}}}}'.encode(), "bucket/x")
    return caught.value


def google_login() -> Exception:
    return pytest.importorskip("google.auth.exceptions").DefaultCredentialsError("no credentials")


@pytest.mark.parametrize(
    ("make", "name", "way_out"),
    [
        (lambda: google(401, "Anonymous caller"), CredentialsMissing, "gcloud auth"),
        (lambda: google(403, "no access"), AccessDenied, "gcloud auth"),
        (lambda: google(429, "slow down"), StorageFailed, "re-run the same command to resume"),
        (google_login, CredentialsMissing, "gcloud auth"),
        (lambda: OSError(errno.ENOSPC, "full"), StorageFull, "free some space"),
        (lambda: ConnectionResetError("gone"), StoreUnreachable, "check the network"),
        (lambda: TimeoutError(), StoreUnreachable, "check the network"),
        (lambda: PermissionError("no"), AccessDenied, "request it"),
        (lambda: OSError("odd"), StorageFailed, "repair the store"),
    ],
)
def test_a_client_s_exception_has_a_name_and_a_fix(
    make: Callable[[], Exception], name: type[ColdstillError], way_out: str
) -> None:
    error = raised(make, "gs://bucket/dataset")
    assert type(error) is name
    assert way_out in str(error)
    assert "gs://bucket/dataset: reading x" in str(error)


def test_a_gated_repository_is_no_missing_one() -> None:
    gated = pytest.importorskip("huggingface_hub.errors").GatedRepoError
    error = gated.__new__(gated)  # made without the answer of a server, which its constructor wants
    assert type(raised(lambda: error, "hf://datasets/a/b")) is AccessDenied


def test_a_missing_file_is_an_answer_for_a_reader_and_a_missing_bucket_for_a_writer() -> None:
    assert type(raised(lambda: google(404, "none"), "gs://bucket/dataset")) is FileNotFoundError
    assert type(raised(lambda: google(404, "none"), "gs://bucket/dataset", writes=True)) is StoreNotFound


@pytest.mark.parametrize("error", [InvalidRow("ours"), TypeError("a defect"), KeyError("a defect")])
def test_what_is_named_already_or_a_defect_of_ours_stays_what_it_is(error: Exception) -> None:
    assert raised(lambda: error, "gs://bucket/dataset") is error
