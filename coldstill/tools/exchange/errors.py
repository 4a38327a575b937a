"""The named errors of import and export."""

from __future__ import annotations

from typing import TypeVar

from coldstill.common.errors import ColdstillError

Error = TypeVar("Error", bound=ColdstillError)


class SourceUnreadable(ColdstillError):
    """What should be imported is not there, is no file of its kind, lacks columns, or holds no rows."""


class CompressionUnknown(ColdstillError):
    """The compression settings of a DistillKit capture are missing, out of bounds, or do not fit its columns."""


class UnusableRow(ColdstillError):
    """A source row that cannot become a row of a dataset."""


class NotFullSoftmax(ColdstillError):
    """The values are no log-probs of the full softmax at temperature 1, and what was done to them cannot be undone."""


class AlignmentDoubtful(ColdstillError):
    """The distributions fit a neighbour of the token that they should predict."""


class NotExportable(ColdstillError):
    """The other layout has no place for something that the dataset holds."""


class OutputNotEmpty(ColdstillError):
    """The folder to export into holds something already."""


def placed(error: Error, where: str) -> Error:
    """The same error with the place before what it says."""
    return type(error)(f"{where}: {error.what}", found=error.found, wanted=error.wanted, fix=error.fix)
