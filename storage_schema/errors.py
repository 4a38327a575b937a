"""The named errors of a dataset. Every one says what, what was found, what was wanted, and what to do.

`ColdstillError` is the root of all errors that a user can cause; the command line prints it and ends with
exit code 1. Anything else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class ColdstillError(Exception):
    """Something the user can mend: `what` (the field, file or row), `found`, `wanted`, and the way out (`fix`)."""

    def __init__(self, what: str, *, found: object = None, wanted: object = None, fix: str = ""):
        self.what, self.found, self.wanted, self.fix = what, found, wanted, fix
        lines = [what]
        if found is not None:
            lines.append(f"  found:  {found}")
        if wanted is not None:
            lines.append(f"  wanted: {wanted}")
        if fix:
            lines.append(f"  do:     {fix}")
        super().__init__("\n".join(lines))

    def at(self, place: str) -> ColdstillError:
        """The same error, with the place where it was found before what it says."""
        return type(self)(f"{place}: {self.what}", found=self.found, wanted=self.wanted, fix=self.fix)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from their positional arguments by default; ours travel between Ray processes whole.
        return _rebuild, (type(self), self.what, self.found, self.wanted, self.fix)


def _rebuild(cls: type[ColdstillError], what: str, found: object, wanted: object, fix: str) -> ColdstillError:
    return cls(what, found=found, wanted=wanted, fix=fix)


class InvalidTargets(ColdstillError):
    """Teacher targets that are not a distribution: shapes, ids, log-probs or mass are off."""


class InvalidRow(ColdstillError):
    """A row whose tokens, spans and targets do not fit together."""


class InvalidHeader(ColdstillError):
    """`dataset.json` (or the copy in a shard's footer) is missing, unreadable or has a field out of bounds."""


class UnsupportedFormat(ColdstillError):
    """The dataset was written in a format version or with a codec that this release does not read."""


class HeaderMismatch(ColdstillError):
    """Two headers that must be equal differ: a changed configuration on an existing dataset, a shard from elsewhere."""


class DatasetNotFound(ColdstillError):
    """There is no dataset at this path."""


class DatasetNotSealed(ColdstillError):
    """The dataset has no manifest yet: its capture has not ended."""


class UnitsMissing(ColdstillError):
    """Sealing was asked for while planned units have no commit record."""


class FileMissing(ColdstillError):
    """A file that a commit record or the manifest names is not there."""


class ShardMissing(FileMissing):
    """A shard is not there."""


class FileDamaged(ColdstillError):
    """A file's size or digest is not the recorded one."""


class ShardDamaged(FileDamaged):
    """A shard cannot be read, or its size or digest is not the recorded one."""


class ShardTooLarge(ColdstillError):
    """A unit's rows make a shard that is larger than the format allows."""


class CommitDamaged(ColdstillError):
    """A commit record, the plan or the manifest cannot be read or names something outside the dataset."""


class StreamDamaged(ColdstillError):
    """A codec stream of a row does not decode: wrong frame, wrong length, or values outside their bounds."""


class StorageFailed(ColdstillError):
    """The store refused a read or a write. What was committed stays good; the run can be started again."""


class StorageFull(StorageFailed):
    """The store has no room left."""


class UnsupportedStore(ColdstillError):
    """The store cannot do what is asked, for instance create a file only if it is absent."""


class TokenizerNotFound(ColdstillError):
    """A folder holds no `tokenizer.json`, or one that cannot be read."""


class TokenizerMismatch(ColdstillError):
    """Two tokenizers that must give every id the same meaning do not."""
