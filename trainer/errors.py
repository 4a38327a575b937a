"""The named errors of training. Those of the dataset and of its tokenizer are in `storage_schema.errors`."""

from __future__ import annotations

from coldstill.common.errors import ColdstillError


class StudentNotFound(ColdstillError):
    """There is no model that transformers can load under the student's name."""


class StudentHeadTooSmall(ColdstillError):
    """The student's head has fewer rows than the dataset's tokenizer has ids."""


class NoTargets(ColdstillError):
    """The dataset holds no target position: there is nothing to learn."""


class NoDraws(ColdstillError):
    """The mixture tail was asked for, and the dataset was captured without tail draws."""


class NonFiniteLoss(ColdstillError):
    """The loss of some rows is not a number; the optimizer was stopped before it moved."""


class CheckpointMismatch(ColdstillError):
    """The output folder holds another run: another dataset, loss, order or recipe."""


class AdapterMisfit(ColdstillError):
    """No layer of the student has one of the names that should get an adapter."""


class PackingUnsupported(ColdstillError):
    """The student lets packed rows see each other."""


class NonFiniteLogits(ColdstillError):
    """The logits of a model that is measured are not numbers: no figure of it would be."""


class NoDrawLogprobs(ColdstillError):
    """The mass-corrected tail was asked for, and the dataset does not hold the log-probs of its draws."""


class DenseLossOnly(ColdstillError):
    """The loss needs every log-prob of the vocabulary, and the dataset keeps a part."""


class RowTooLong(ColdstillError):
    """A row has more tokens than a pack holds, and rows are never split."""


class MoreThanStored(ColdstillError):
    """More kept ids or draws were asked for than the dataset holds."""


class InvalidMixture(ColdstillError):
    """Datasets or weights that cannot be mixed."""


class CursorMismatch(ColdstillError):
    """A cursor leads into another sequence of rows: of another dataset, seed, order or packing."""


class NoAnswers(ColdstillError):
    """Answers were to be compared with references, and no row of the dataset has a prompt and an answer."""


class TaskFailed(ColdstillError):
    """A benchmark task cannot be read, found or run."""
