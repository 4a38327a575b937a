"""What the clients of stores raise, by our names. An exception of the system, fsspec, botocore, gcsfs or the Hub in, a
`StorageFailed` out.

Those clients share no base class, are not all installed, and may not be imported for an error's sake: they are told
apart by the names of their classes and by the codes that they carry.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.errors import CommitDamaged, StorageFailed, StorageFull


class CredentialsMissing(StorageFailed):
    """The store wants to know who asks, and there are no credentials for it, or none that are valid."""


class AccessDenied(StorageFailed):
    """The store knows who asks, and refuses."""


class StoreNotFound(StorageFailed):
    """There is no such bucket, repository or revision."""


class StoreUnreachable(StorageFailed):
    """The store does not answer."""


class OutsideDataset(CommitDamaged):
    """A file of a local dataset is a link that leads out of it, or a device, pipe or socket."""


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, "XMinioStorageFull", 507}
_NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
    *("TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError"),
    *("DefaultCredentialsError", "RefreshError", "LocalTokenNotFoundError"),
    *("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", 401),
}
_DENIED = {"PermissionError", "GatedRepoError", "DisabledRepoError", "AccessDenied", 403}
_NOT_FOUND = {"RepositoryNotFoundError", "RevisionNotFoundError", "NoSuchBucket"}
_UNREACHABLE = {
    *("ConnectionError", "TimeoutError", "ClientConnectionError", "TransportError", "HTTPClientError"),
    *("ConnectTimeout", "ReadTimeout"),
}
_CLIENTS = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "hf_xet", "httpx", "httpx2", "huggingface_hub"}
_AGAIN = "start the same command again: what was committed stays good"
_LOGIN = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "run `hf auth login`, or set HF_TOKEN",
}


def error_codes(error: BaseException) -> set[str | int]:
    """What an exception and its causes are called: class names, S3 error codes, HTTP status codes."""
    codes: set[str | int] = set()
    for cause in _chain(error):
        codes |= {cls.__name__ for cls in type(cause).__mro__}
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            codes.add(response.get("Error", {}).get("Code", ""))
        code = getattr(response, "status_code", getattr(cause, "code", None))
        if isinstance(code, (int, str)):
            codes.add(int(code) if str(code).isdigit() else code)
        if isinstance(cause, OSError) and str(cause).startswith("Forbidden:"):
            codes.add(403)  # gcsfs says it in words
    return codes


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_from_a_client(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS


@contextmanager
def named_errors(url: str, doing: str, *, writes: bool = False) -> Iterator[None]:
    """Raise what a store's client raises as `StorageFailed` or one of its kinds; `doing` is "reading shards/x".

    `FileNotFoundError` stays what it is, for a reader to answer; nothing is missing for a writer but the bucket.
    """
    try:
        yield
    except ColdstillError:
        raise
    except Exception as error:
        named = _named(error, url, doing, writes=writes)
        if named is None:
            raise
        raise named from error


def _named(error: Exception, url: str, doing: str, *, writes: bool) -> StorageFailed | None:
    kind: type[StorageFailed]
    codes = error_codes(error)
    protocol, remote, _ = url.partition("://")
    login = _LOGIN.get({"s3a": "s3", "gcs": "gs"}.get(protocol, protocol), "ask who owns the store")
    if codes & _NO_ROOM or (isinstance(error, OSError) and error.errno in _NO_ROOM):
        kind, wanted, fix = StorageFull, "a store that takes one more file", f"free some room, and {_AGAIN}"
    elif "GatedRepoError" in codes:  # a subclass of "not found" in its library
        kind, wanted, fix = AccessDenied, "access to it", "ask for access on the repository's page"
    elif codes & _NOT_FOUND or (isinstance(error, FileNotFoundError) and writes and remote):
        kind, wanted = StoreNotFound, "a bucket or repository that is there"
        fix = f"check the name, make it first, or, where it is private: {login}"
    elif codes & _NO_CREDENTIALS:
        kind, wanted, fix = CredentialsMissing, "valid credentials", login
    elif codes & _DENIED:
        kind, wanted, fix = AccessDenied, "the right to do this", f"ask for it, or, as somebody else: {login}"
    elif isinstance(error, FileNotFoundError) and not writes:
        return None
    elif codes & _UNREACHABLE:
        kind, wanted, fix = StoreUnreachable, "an answer", f"check the network and the address, and {_AGAIN}"
    elif any(_is_from_a_client(cause) for cause in _chain(error)):
        kind, wanted, fix = StorageFailed, "a store that reads and writes", f"mend the store, and {_AGAIN}"
    else:
        return None
    return kind(f"{url}: {doing}", found=str(error).strip() or type(error).__name__, wanted=wanted, fix=fix)
