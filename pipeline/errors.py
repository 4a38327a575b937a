"""All error classes of a capture, except those of stores and files."""

from __future__ import annotations

from coldstill.common.errors import ColdstillError


class SourceNotFound(ColdstillError):
    """No file exists at the source's path, or `datasets` finds no such dataset."""


class SourceUnreadable(ColdstillError):
    """The source has an unknown format, or is damaged."""


class SourceEmpty(ColdstillError):
    """The source has no rows."""


class SourceChanged(ColdstillError):
    """The source differs from the one that the capture was started with."""


class SourceAdapterFailed(ColdstillError):
    """The function `source.adapter` raised an exception, or returned something other than a dict or None."""


class TemplateCannotMark(ColdstillError):
    """The chat template is missing, or does not show which tokens are the assistant's."""


class TeacherUnusable(ColdstillError):
    """The teacher's configuration, tokenizer or weights cannot be loaded, or do not fit the settings."""


class TeacherOutputInvalid(ColdstillError):
    """An engine returned something other than K log-probs for each target position."""


class ClusterTooSmall(ColdstillError):
    """A worker needs more resources than this machine has, so it can never start."""


class ClusterUnreachable(ColdstillError):
    """Ray did not start on this machine, or the cluster to join did not answer."""


class UnitFailed(ColdstillError):
    """A work unit failed; all others stay committed."""


class LeaseHeld(ColdstillError):
    """Another driver is running a capture into the same directory."""


class LeaseLost(ColdstillError):
    """Another driver took over the directory while this one was running."""


class CaptureIncomplete(ColdstillError):
    """Some work units failed; all others are committed, and the dataset is not sealed."""


class TooManyUnits(ColdstillError):
    """The plan has more work units than a manifest can list."""


class EndpointFailed(ColdstillError):
    """The teacher's server cannot be reached, or fails repeatedly."""


class EndpointRefused(EndpointFailed):
    """The teacher's server rejects a request, and would reject it again."""
