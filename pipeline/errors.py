"""All error classes of a capture, except those of stores and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coldstill.common.errors import ColdstillError


class SourceNotFound(ColdstillError):
    """No file exists at the source's path, or `datasets` finds no such dataset.

    Fix: check `source.path`, or `source.dataset` with its configuration, split and revision.
    """


class SourceUnreadable(ColdstillError):
    """The source has an unknown format, or is damaged.

    Fix: write or download the file again, or convert it to JSON Lines or Parquet.
    """


class SourceEmpty(ColdstillError):
    """The source has no rows.

    Fix: check `source.path`, or the dataset's split.
    """


class SourceChanged(ColdstillError):
    """The source differs from the one that the capture was started with.

    Fix: restore the source or the setting that the message names, or capture into another output.
    """


class WriterRoundUnused(ColdstillError):
    """`source.round` is not 0, and the rows of `source.rows_of` have a writer of another round, or none.

    Fix: remove `source.round`: the header of the rows names their writer.
    """


class SourceAdapterFailed(ColdstillError):
    """The function `source.adapter` raised an exception, or returned something other than a dict or None.

    Fix: correct the function, and re-run the same command to resume.
    """


class TemplateCannotMark(ColdstillError):
    """The chat template is missing, or does not show which tokens are the assistant's.

    Fix: set `source.loss_on: last_turn`, or set `source.chat_template` to a template with generation marks, such as
    those in examples/chat_templates.
    """


class TemplateDrops(ColdstillError):
    """The chat template leaves out the same part of each of the first chats.

    Fix: choose a template that renders this part and name it in `source.chat_template`, or list the part in
    `source.may_drop`.
    """


class AllRowsRejected(ColdstillError):
    """No row of the source, or none of its first rows, is usable.

    Fix: name the columns in `source.messages`, `source.prompt` and `source.response`, or `source.text`; correct the
    rows if the columns are right. The message counts the reasons and has an example.
    """


class DuplicateIds(ColdstillError):
    """Several rows of the source have one sample id.

    Fix: set `source.duplicate_ids: number`, which adds the row number to each id, or name another column in
    `source.id`.
    """


class TeacherUnusable(ColdstillError):
    """The teacher's configuration, tokenizer or weights cannot be loaded, or do not fit the settings.

    Fix: change the setting or install the package that the message names; `teacher.engine: transformers` loads most
    models that vLLM does not.
    """


class TeacherOutputInvalid(ColdstillError):
    """An engine returned something other than K log-probs for each target position.

    Fix: check the teacher's weights, or set another `teacher.dtype`. For an engine of your own, compare its result with
    the docstring of `Teacher.score` in pipeline/teachers/protocol.py.
    """


class ClusterTooSmall(ColdstillError):
    """A worker needs more resources than this machine has, so it can never start.

    Fix: lower `cluster.cpus_per_worker` or `cluster.gpus_per_worker`, or join a larger cluster with `cluster.address`.
    """


class ClusterUnreachable(ColdstillError):
    """Ray did not start on this machine, or the cluster to join did not answer.

    Fix: correct `cluster.address` or RAY_ADDRESS, or leave both out to start Ray on this machine.
    """


class UnitFailed(ColdstillError):
    """A work unit failed; all others stay committed.

    Fix: fix the reason that the message gives, and re-run the same command to resume.
    """


class LeaseHeld(ColdstillError):
    """Another driver is running a capture into the same directory.

    Fix: wait for the other driver, or stop it first. A driver without a heartbeat for `cluster.driver_dead_after_s`
    counts as dead and is replaced.
    """


class LeaseLost(ColdstillError):
    """Another driver took over the directory while this one was running.

    Fix: let the other driver finish; all units that this one committed are kept.
    """


class CaptureIncomplete(ColdstillError):
    """Some work units failed; all others are committed, and the dataset is not sealed.

    Fix: fix the reasons that the message lists, and re-run the same command to resume.
    """


class TooManyUnits(ColdstillError):
    """The plan has more work units than a manifest can list.

    Fix: raise `rows_per_unit`, or capture parts of the source and merge them.
    """


class ImageHostFailed(ColdstillError):
    """A host of images is allowed, and does not answer.

    Fix: re-run the same command to resume, or take the host out of `source.image_hosts`, which rejects its rows.
    """


class EndpointFailed(ColdstillError):
    """The teacher's server cannot be reached, or fails repeatedly.

    Fix: check that the server runs and that the workers can reach it; then re-run the same command to resume.
    """


class EndpointRefused(EndpointFailed):
    """The teacher's server rejects a request, and would reject it again.

    Fix: check `teacher.endpoint`, the key that the server requires, and the options with which it was started.
    """


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
