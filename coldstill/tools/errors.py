"""All named errors of the tools. What reading a dataset raises is in `storage_schema/errors.py`."""

from __future__ import annotations

from pydantic import ValidationError

from coldstill.common.errors import ColdstillError


def invalid_field(failure: ValidationError, *, where: str, error: type[ColdstillError]) -> ColdstillError:
    """An `error` that names the first field that pydantic rejects."""
    first = failure.errors()[0]
    field = ".".join(map(str, first["loc"])) or "settings"
    return error(f"{where}: {field}", found=repr(first["input"])[:200], wanted=first["msg"])


# ---- inspect ---------------------------------------------------------------------------------------------------------


class RowOutOfRange(ColdstillError):
    """The dataset has no row of this number."""


class PageNotWritten(ColdstillError):
    """The page's file cannot be written."""


class TokenizerUnreadable(ColdstillError):
    """The dataset's tokenizer is too large, or this release of `tokenizers` cannot load it."""


# ---- verify ----------------------------------------------------------------------------------------------------------


class MediaTypeWrong(ColdstillError):
    """The type of a medium is not that of its content, or not one that is read."""

    usual_fix = "capture it again: a capture takes the type from the content"


class MediaUnused(ColdstillError):
    """The manifest lists a media file that no row refers to."""


# ---- card, push, pull ------------------------------------------------------------------------------------------------


class CardExists(ColdstillError):
    """There is a card already, and someone may have edited it."""


class CardRefused(ColdstillError):
    """The Hub rejects the metadata at the head of the dataset card."""


class AnotherDataset(ColdstillError):
    """The destination holds another dataset, a capture that has not finished, or files of something else."""


# ---- merge, split, subset --------------------------------------------------------------------------------------------


class InvalidRequest(ColdstillError):
    """Invalid arguments: no source, one twice, shares that do not sum to 1, an empty range of rows."""


class InvalidFilter(ColdstillError):
    """A filter is not KEY OP VALUE."""


class NothingSelected(ColdstillError):
    """The new dataset would have no rows."""


class OutputTaken(ColdstillError):
    """The output holds another dataset, a capture, or the unfinished result of another command or other arguments."""


class OutputNotApart(ColdstillError):
    """The output lies inside a source, or a source inside the output."""


class MediaClash(ColdstillError):
    """Two sources have a media file of the same name with different content."""


# ---- import, export --------------------------------------------------------------------------------------------------


class SourceUnreadable(ColdstillError):
    """The source of an import is missing, has another file format, lacks columns, or holds no rows."""


class CompressionUnknown(ColdstillError):
    """The compression settings of a DistillKit capture are missing, out of bounds, or do not fit its columns."""


class UnusableRow(ColdstillError):
    """A source row cannot become a row of a dataset."""


class NotFullSoftmax(ColdstillError):
    """The values are not log-probs of the full softmax at temperature 1, and the originals cannot be computed."""


class AlignmentDoubtful(ColdstillError):
    """The distributions predict a neighbor of the token that they should predict."""


class NotExportable(ColdstillError):
    """The other layout cannot hold a part of the dataset, such as images."""


class OutputNotEmpty(ColdstillError):
    """The folder to export into is not empty."""


class DuplicateIds(ColdstillError):
    """Several rows of a dataset have one sample id."""
