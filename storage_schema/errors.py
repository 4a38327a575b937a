"""The named errors of a dataset. Each says what failed, the value found, the value wanted, and what to do."""

from __future__ import annotations

from coldstill.common.errors import ColdstillError


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
