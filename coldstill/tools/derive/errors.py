"""The named errors of merge, split and subset."""

from __future__ import annotations

from coldstill.common.errors import ColdstillError


class InvalidRequest(ColdstillError):
    """What is asked for makes no sense: no source, one twice, parts that do not sum to 1, a range of no rows."""


class InvalidFilter(ColdstillError):
    """A filter that is not KEY OP VALUE."""


class NothingSelected(ColdstillError):
    """The new dataset would have no rows."""


class OutputTaken(ColdstillError):
    """The output holds something else: another dataset, a capture, or what another command or request began."""


class OutputNotApart(ColdstillError):
    """The output lies inside a source, or a source inside the output."""


class MediaClash(ColdstillError):
    """Two sources have a media file of the same name with different content."""
