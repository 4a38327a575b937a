"""The named errors of a capture."""

from __future__ import annotations

from coldstill.common.errors import ColdstillError


class SourceNotFound(ColdstillError):
    """There is no file at the source's path."""


class SourceUnreadable(ColdstillError):
    """The source is of an unknown kind, or is damaged."""


class SourceEmpty(ColdstillError):
    """The source has no row."""


class SourceChanged(ColdstillError):
    """The source is no longer what the plan was made from."""


class TemplateCannotMark(ColdstillError):
    """The chat template is missing, or cannot tell which tokens are the assistant's."""


class TeacherUnusable(ColdstillError):
    """The teacher's configuration, tokenizer or weights cannot be loaded or do not fit the settings."""


class TeacherOutputInvalid(ColdstillError):
    """An engine gave something that is not K log-probs for each wanted position."""


class ClusterTooSmall(ColdstillError):
    """A worker asks for more than this machine has: it could never start."""


class UnitFailed(ColdstillError):
    """A unit could not be done; all others stay committed."""


class LeaseHeld(ColdstillError):
    """Another driver is at work on the dataset directory."""


class LeaseLost(ColdstillError):
    """Another driver took the dataset directory over while this one was at work."""


class CaptureIncomplete(ColdstillError):
    """Some units could not be done; all others are committed, and the dataset is not sealed."""


class TooManyUnits(ColdstillError):
    """The plan has more units than a manifest can list."""


class EndpointFailed(ColdstillError):
    """The teacher's server cannot be reached, or fails again and again."""


class EndpointRefused(EndpointFailed):
    """The teacher's server refuses a request, and would again."""
