"""All error classes of a capture, except those of stores and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coldstill.common.errors import ColdstillError


class SourceNotFound(ColdstillError):
    """No file exists at the source's path, or `datasets` finds no such dataset."""


class SourceUnreadable(ColdstillError):
    """The source has an unknown format, or is damaged."""


class SourceEmpty(ColdstillError):
    """The source has no rows."""


class SourceChanged(ColdstillError):
    """The source differs from the one that the capture was started with."""


class WriterRoundUnused(ColdstillError):
    """`source.round` is not 0, and the rows of `source.rows_of` have a writer of another round, or none."""


class SourceAdapterFailed(ColdstillError):
    """The function `source.adapter` raised an exception, or returned something other than a dict or None."""


class TemplateCannotMark(ColdstillError):
    """The chat template is missing, or does not show which tokens are the assistant's."""


class TemplateDrops(ColdstillError):
    """The chat template leaves out the same part of each of the first chats."""


class AllRowsRejected(ColdstillError):
    """No row of the source, or none of its first rows, is usable."""


class DuplicateIds(ColdstillError):
    """Several rows of the source have one sample id."""


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


class ImageHostFailed(ColdstillError):
    """A host of images is allowed, and does not answer."""


class EndpointFailed(ColdstillError):
    """The teacher's server cannot be reached, or fails repeatedly."""


class EndpointRefused(EndpointFailed):
    """The teacher's server rejects a request, and would reject it again."""


_COLUMNS = "the columns of messages, prompt and response, or text"
_MAX_COLUMNS = 20


def all_rejected(
    reasons: Mapping[str, int], *, what: str, example: str, columns: Sequence[str] | Mapping[str, object] | None = None
) -> AllRowsRejected:
    """The error for rows of which each is rejected: `reasons` counted, one `example`, and their `columns` if known."""
    counted = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    found = f"all are rejected ({counted}), such as {example}"
    fix = "correct the rows, or the settings that select and render them"
    if columns and not {"no_messages", "no_text", "bad_images"}.isdisjoint(reasons):
        found += f"\n          columns found: {', '.join([*columns][:_MAX_COLUMNS])}"
    if "no_messages" in reasons or "no_text" in reasons:
        fix = "name the column in source.messages, or in source.prompt and source.response, or in source.text"
    elif "image_not_found" in reasons:
        fix = "set source.image_root to the folder of the images, or source.image_hosts to the hosts that have them"
    return AllRowsRejected(what, found=found, wanted="at least one usable row", fix=fix)
