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
    """The dataset has no row of this number.

    Fix: choose a row below the number of rows that the message gives.
    """


class PageNotWritten(ColdstillError):
    """A file that an option names, such as a page or a picture, cannot be written.

    Fix: choose another path.
    """


class TokenizerUnreadable(ColdstillError):
    """The dataset's tokenizer is too large, or this release of `tokenizers` cannot load it.

    Fix: install a newer release of `tokenizers`, or pull the dataset again.
    """


# ---- verify ----------------------------------------------------------------------------------------------------------


class MediaTypeWrong(ColdstillError):
    """The type of a medium is not that of its content, or not one that is read."""

    usual_fix = "capture it again: a capture takes the type from the content"


class MediaUnused(ColdstillError):
    """The manifest lists a media file that no row refers to.

    Fix: `coldstill subset SOURCE OUTPUT` makes a dataset of the same rows without this file.
    """


# ---- card, push, pull ------------------------------------------------------------------------------------------------


class CardExists(ColdstillError):
    """There is a card already, and someone may have edited it.

    Fix: move the card away, or pass `--replace` to overwrite it.
    """


class CardRefused(ColdstillError):
    """The Hub rejects the metadata at the head of the dataset card.

    Fix: write a new card with `coldstill card --replace`, or correct the lines between its first two `---`.
    """


class AnotherDataset(ColdstillError):
    """The destination holds another dataset, a capture that has not finished, or files of something else.

    Fix: choose another destination, or remove what is there.
    """


# ---- merge, split, subset --------------------------------------------------------------------------------------------


class InvalidRequest(ColdstillError):
    """Invalid arguments: no source, one twice, shares that do not sum to 1, an empty range of rows.

    Fix: correct the argument that the message names.
    """


class InvalidFilter(ColdstillError):
    """A filter is not KEY OP VALUE.

    Fix: write the filter as in `--filter "tokens <= 512"`; the message lists the keys.
    """


class NothingSelected(ColdstillError):
    """The new dataset would have no rows.

    Fix: loosen the filters, or look at the source with `coldstill inspect`.
    """


class OutputTaken(ColdstillError):
    """The output holds another dataset, a capture, or the unfinished result of another command or other arguments.

    Fix: choose another output, or remove this one.
    """


class OutputNotApart(ColdstillError):
    """The output lies inside a source, or a source inside the output.

    Fix: choose another output.
    """


class MediaClash(ColdstillError):
    """Two sources have a media file of the same name with different content.

    Fix: name media files by their content before a capture.
    """


# ---- import, export --------------------------------------------------------------------------------------------------


class SourceUnreadable(ColdstillError):
    """The source of an import is missing, has another file format, lacks columns, or holds no rows.

    Fix: pass the files that the other tool wrote, with all their columns.
    """


class CompressionUnknown(ColdstillError):
    """The compression settings of a DistillKit capture are missing, out of bounds, or do not fit its columns.

    Fix: pass the settings of that capture with `--config`.
    """


class UnusableRow(ColdstillError):
    """A source row cannot become a row of a dataset.

    Fix: reject such rows with `--bad-rows reject`, or correct them.
    """


class NotFullSoftmax(ColdstillError):
    """The values are not log-probs of the full softmax at temperature 1, and the originals cannot be computed.

    Fix: state what the values are with `--normalized-over vocabulary` if they are log-probs of the full softmax; store
    the natural logarithm of probabilities.
    """


class AlignmentDoubtful(ColdstillError):
    """The distributions predict a neighbor of the token that they should predict.

    Fix: check how these rows were made; `--predicts` states which token a list is about.
    """


class NotExportable(ColdstillError):
    """The other layout cannot hold a part of the dataset, such as images.

    Fix: make a subset without such rows, for instance with `--filter "media == 0"`, and export that.
    """


class OutputNotEmpty(ColdstillError):
    """The folder to export into is not empty.

    Fix: choose another folder.
    """


class DuplicateIds(ColdstillError):
    """Several rows of a dataset have one sample id.

    Fix: capture again with `source.duplicate_ids: number`.
    """
