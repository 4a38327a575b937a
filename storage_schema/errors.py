"""Every named error of a dataset and its store, and the translation of store clients' exceptions.

Each error states what failed, the value found, the value wanted, and the fix.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime

from coldstill.common.errors import ColdstillError

_COPY_AGAIN = (
    "re-run the command; if the error stays, copy this file again from where the dataset came from. The "
    "capture that wrote it can make the file again: coldstill capture CONFIG.yaml --repair"
)


class InvalidTargets(ColdstillError):
    """Teacher targets that are not a distribution: wrong shapes, ids, log-probs or total mass.

    Fix: correct the engine that returned them, or make a dataset without this row with `coldstill subset`.
    """


class InvalidRow(ColdstillError):
    """A row whose tokens, spans and targets do not match.

    Fix: make a dataset without this row with `coldstill subset`, or correct the code that made the row.
    """


class InvalidHeader(ColdstillError):
    """`dataset.json` (or the copy in a shard's footer) is missing, unreadable or has a field out of bounds.

    Fix: restore `dataset.json` from a copy, or capture again.
    """


class UnsupportedFormat(ColdstillError):
    """The dataset was written in a format version or with a codec that this release does not read.

    Fix: install a newer release of Coldstill, or the release that wrote the dataset.
    """


class HeaderMismatch(ColdstillError):
    """Two headers that must be equal differ: a changed configuration, or a shard of another dataset.

    Fix: restore the setting that the message names, or choose another output. To train on datasets that differ, list
    them: `dataset: [A, B]`.
    """


class DatasetNotFound(ColdstillError):
    """There is no dataset at this path.

    Fix: check the path: it is the `output` of `coldstill capture`.
    """


class DatasetNotSealed(ColdstillError):
    """The dataset has no manifest yet: its capture has not finished.

    Fix: re-run the command that wrote it to resume: it adds the missing units and seals.
    """


class UnitsMissing(ColdstillError):
    """`seal` was called while planned units have no commit record.

    Fix: re-run the same command to resume: it adds the missing units and seals.
    """


class FileMissing(ColdstillError):
    """A file that a commit record or the manifest names does not exist."""

    usual_fix = (
        "copy the dataset again from where it came from: this copy is incomplete. The capture that wrote it can "
        "make the file again: coldstill capture CONFIG.yaml"
    )


class ShardMissing(FileMissing):
    """A shard does not exist."""


class FileDamaged(ColdstillError):
    """A file's size or digest differs from the recorded one."""

    usual_fix = _COPY_AGAIN


class ShardDamaged(FileDamaged):
    """A shard cannot be read, or its size or digest differs from the recorded one."""


class ShardTooLarge(ColdstillError):
    """The rows of a unit make a shard larger than the format allows."""

    usual_fix = "lower rows_per_unit, and choose another output"


class TooManyMedia(ColdstillError):
    """The dataset has more media files than its manifest can list."""

    usual_fix = (
        "store more media in the rows: raise source.images_in_row_bytes and capture to another output; or make several "
        "datasets, with `coldstill subset SOURCE OUTPUT --rows START:STOP`"
    )


class CommitDamaged(ColdstillError):
    """A commit record, the plan or the manifest cannot be read, or names a path outside the dataset.

    Fix: copy the file again from where the dataset came from, or let the capture that wrote it make it again with
    `coldstill capture CONFIG.yaml --repair`.
    """


class OutsideDataset(CommitDamaged):
    """A file of a local dataset is a link to a place outside it, or a device, pipe or socket.

    Fix: if you trust its links, copy the dataset with the files that they point to: `cp -rL`.
    """


class ForeignFile(ColdstillError):
    """The manifest lists a file that the format does not have, such as a model's weights or code.

    Fix: `coldstill subset SOURCE OUTPUT` makes a dataset of the same rows without this file.
    """


class StreamDamaged(ColdstillError):
    """A codec stream of a row does not decode: wrong frame, wrong length, or values out of bounds."""

    usual_fix = _COPY_AGAIN


class TokenizerNotFound(ColdstillError):
    """A folder has no readable `tokenizer.json`.

    Fix: save the tokenizer with `save_pretrained` of a fast tokenizer of transformers.
    """


class TokenizerUnfaithful(ColdstillError):
    """A tokenizer, as transformers loads it, gives other ids or texts than its own `tokenizer.json`.

    Fix: save the tokenizer again with `save_pretrained` of transformers' `PreTrainedTokenizerFast`.
    """


class TokenizerMismatch(ColdstillError):
    """Two tokenizers that must give every id the same meaning do not.

    Fix: choose a student of the teacher's family, or capture with a teacher of the student's family.
    """


class UnsupportedStore(ColdstillError):
    """The store lacks an operation that is needed, for instance creating a file only if it is absent.

    Fix: check the URL and install `coldstill[share]`; `coldstill push` copies a dataset to a store that cannot be
    written directly.
    """


class StorageFailed(ColdstillError):
    """The store failed a read or a write. Committed units are intact; the same command resumes the run.

    Fix: repair the store, and re-run the same command to resume.
    """

    retry_after_s: float = 0.0
    """The seconds that the store asked to wait, by its Retry-After header."""


class StorageFull(StorageFailed):
    """The store has no space left.

    Fix: free some space, and re-run the same command to resume.
    """


class CredentialsMissing(StorageFailed):
    """The store needs credentials, and there are none or none that are valid.

    Fix: log in: AWS_PROFILE or the AWS keys for S3, `gcloud auth application-default login` for Google, `hf auth login`
    for the Hub.
    """


class AccessDenied(StorageFailed):
    """The credentials are valid and lack the permission.

    Fix: request the permission, or use other credentials.
    """


class StoreNotFound(StorageFailed):
    """There is no such bucket, repository or revision.

    Fix: check the name, create the bucket or repository first, or log in if it is private.
    """


class StoreUnreachable(StorageFailed):
    """The store does not respond.

    Fix: check the network and the address, and re-run the same command to resume.
    """


# Clients of stores (fsspec, botocore, gcsfs, huggingface_hub) share no base class and are not all installed, and
# importing one takes seconds. So their exceptions are recognized by class name and by the codes that they carry.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, "XMinioStorageFull", 507}
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
_TRANSIENT = {
    *(408, 425, 429, 500, 502, 503, 504),
    *("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "ThrottlingException"),
    "TemporaryFileGone",
    *("ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ResponseStreamingError", "RemoteProtocolError"),
}
MAX_RETRY_AFTER_S = 900.0
"""The longest wait that a store may ask for. If it asks for more, the command ends with that error."""

_RESUME = "re-run the same command to resume: committed units are kept"
_LOGIN = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "run `hf auth login`, or set HF_TOKEN",
}


@contextmanager
def named_errors(url: str, doing: str, *, writes: bool = False) -> Iterator[None]:
    """Raises exceptions of a store's client as `StorageFailed` or a subclass; `doing` is such as "reading shards/x".

    A `FileNotFoundError` of a read propagates unchanged, for the caller to handle. In a write, only the bucket can be
    missing: that is `StoreNotFound`.
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


def error_codes(error: BaseException) -> set[str | int]:
    """Class names, S3 error codes and HTTP status codes of an exception and its causes."""
    codes: set[str | int] = set()
    for cause in _chain(error):
        codes |= {cls.__name__ for cls in type(cause).__mro__}
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            codes.add(response.get("Error", {}).get("Code", ""))
        code = getattr(response, "status_code", getattr(cause, "code", None))
        if isinstance(code, (int, str)):
            codes.add(int(code) if str(code).isascii() and str(code).isdigit() else code)
        if isinstance(cause, OSError) and str(cause).startswith("Forbidden:"):
            codes.add(403)  # gcsfs writes it in the message only
    return codes


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: too many requests, a busy server, a connection that was cut."""
    if type(error) not in (StorageFailed, StoreUnreachable) or getattr(error, "retry_after_s", 0) > MAX_RETRY_AFTER_S:
        return False
    return isinstance(error, StoreUnreachable) or any(error_codes(cause) & _TRANSIENT for cause in _chain(error))


def _retry_after_s(error: BaseException) -> float:
    """The Retry-After header of the response behind an exception: seconds, or a date."""
    for cause in _chain(error):
        headers = getattr(getattr(cause, "response", None), "headers", None) or {}
        text = str(headers.get("Retry-After") or "").strip()
        if text.isascii() and text.isdigit():
            return float(text[:9])
        if text:
            with suppress(ValueError, TypeError):
                return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_from_a_client(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS


def _named(error: Exception, url: str, doing: str, *, writes: bool) -> StorageFailed | None:
    kind: type[StorageFailed]
    codes = error_codes(error)
    protocol, remote, _ = url.partition("://")
    login = _LOGIN.get({"s3a": "s3", "gcs": "gs"}.get(protocol, protocol), "contact the owner of the store")
    if codes & _FULL or (isinstance(error, OSError) and error.errno in _FULL):
        kind, wanted, fix = StorageFull, "space for one more file", f"free some space, and {_RESUME}"
    elif "GatedRepoError" in codes:  # a subclass of "not found" in its library
        kind, wanted, fix = AccessDenied, "access to it", "request access on the repository's page"
    elif codes & _NOT_FOUND or (isinstance(error, FileNotFoundError) and writes and remote):
        kind, wanted = StoreNotFound, "an existing bucket or repository"
        fix = f"check the name, create it first, or, if it is private: {login}"
    elif codes & _NO_CREDENTIALS:
        kind, wanted, fix = CredentialsMissing, "valid credentials", login
    elif codes & _DENIED:
        kind, wanted, fix = AccessDenied, "permission to do this", f"request it, or use other credentials: {login}"
    elif isinstance(error, FileNotFoundError) and not writes and not codes & (_UNREACHABLE | _TRANSIENT):
        return None  # fsspec raises it for any failure of an http server, and names that one as its cause
    elif codes & _UNREACHABLE:
        kind, wanted, fix = StoreUnreachable, "a response", f"check the network and the address, and {_RESUME}"
    elif any(_is_from_a_client(cause) for cause in _chain(error)):
        kind, wanted, fix = StorageFailed, "a store that reads and writes", f"repair the store, and {_RESUME}"
    else:
        return None
    named = kind(f"{url}: {doing}", found=str(error).strip() or type(error).__name__, wanted=wanted, fix=fix)
    named.retry_after_s = _retry_after_s(error)
    return named
