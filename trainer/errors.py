"""All error classes of training. Those of datasets and tokenizers are in `storage_schema.errors`."""

from __future__ import annotations

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.errors import TokenizerMismatch


class UnsupportedArgument(ColdstillError, ValueError):
    """An argument of transformers' Trainer, or a value of one, that training from stored log-probs cannot honor."""


class UnknownMetric(ColdstillError):
    """No evaluation of the run measures the metric that selects the best checkpoint."""


class InvalidMixture(ColdstillError):
    """Datasets or weights that cannot be mixed."""


class EnsembleMismatch(ColdstillError):
    """The datasets of an ensemble do not hold the same rows."""


class NoTargets(ColdstillError):
    """A dataset has no target position, so nothing can be learned from it."""


class MoreThanStored(ColdstillError):
    """A setting requests more kept ids or draws than the dataset holds."""


class RowTooLong(ColdstillError):
    """A row has more tokens than a pack holds, or than the student's context with its images expanded; rows are never
    split."""


class StudentSeesNoImages(ColdstillError):
    """A row has images, and the student reads text alone."""


class ImageTokenMismatch(ColdstillError):
    """The student's configuration and its processor name different tokens for the patches of an image."""


class NothingToFreeze(ColdstillError):
    """No weight of the student has a name that `student.freeze` lists."""


class CursorMismatch(ColdstillError):
    """A cursor belongs to another sequence of rows: another dataset, seed, order or pack length."""


class LoaderWorkerDied(ColdstillError):
    """A process of the data loader ended, killed by a signal: most often SIGKILL, when memory ran out."""


class StudentNotFound(ColdstillError):
    """No model that transformers can load has the student's name."""


class TokenizerNotAligned(TokenizerMismatch):
    """The text of a teacher's tokens cannot be aligned with the tokens of a student that has another tokenizer."""


class OtherTokenizerUnsupported(ColdstillError):
    """A setting that a student with another tokenizer than the dataset's cannot be trained with."""


class StudentHeadTooSmall(ColdstillError):
    """The student's head has fewer rows than the dataset's tokenizer has ids."""


class AdapterMisfit(ColdstillError):
    """No layer of the student has a name in `student.lora.target_modules`, or no weight of it is trained."""


class SpecialTokenInvalid(ColdstillError):
    """A begin, end or padding token in `student.from_scratch` is no id of the dataset's tokenizer."""


class WrapperUnsupported(ColdstillError):
    """A wrapper around the student changes the sequence in a way that training cannot follow."""


class StudentDiffers(ColdstillError):
    """The finished student, loaded again, does not give the logits of the trained model."""


class PackingUnsupported(ColdstillError):
    """The student attends across the rows of a pack."""


class ExtraLossUnsupported(ColdstillError):
    """The student's configuration requests an auxiliary loss that its class does not compute."""


class AttentionMismatch(ColdstillError):
    """The student attends to later tokens, or the named implementation of attention is wrong for it."""


class NoDraws(ColdstillError):
    """The loss needs tail draws, and the dataset was captured without them."""


class NoDrawLogprobs(ColdstillError):
    """The mass-corrected tail needs the log-probs of the draws, and the dataset does not hold them."""


class DenseLossOnly(ColdstillError):
    """The loss needs all log-probs of the vocabulary, and the dataset holds a part of them."""


class NotStudentRows(ColdstillError):
    """The loss needs rows that the student wrote, and another model or the source wrote those of a dataset."""


class NonFiniteLoss(ColdstillError):
    """The loss of some rows is not finite; training stopped before the optimizer step."""


class NonFiniteGradient(ColdstillError):
    """The gradient of an optimizer step is not finite; training stopped before the optimizer step."""


class NonFiniteWeights(ColdstillError):
    """The student's own weights hold values that are not finite."""


class CheckpointDamaged(ColdstillError):
    """A file of a checkpoint is missing, or is not as it was written."""


class CheckpointMismatch(ColdstillError):
    """The output folder or a checkpoint belongs to another run: another dataset, loss, data order or recipe."""


class TeacherSawAnotherPrompt(ColdstillError):
    """The dataset's teacher saw another prompt than the rows have, so a resident teacher cannot be compared with it."""


class NonFiniteLogits(ColdstillError):
    """The logits of a model under evaluation are not finite."""


class NoAnswers(ColdstillError):
    """ROUGE needs reference answers, and no row of the dataset has a prompt and an answer."""


class TaskFailed(ColdstillError):
    """A benchmark task cannot be found, read or run."""


class RunNotFound(ColdstillError):
    """A folder is not the output of a training."""


class RunDamaged(ColdstillError):
    """A file of a run's output cannot be read as what a training writes there."""


class EvaluationNotOfRun(ColdstillError):
    """A report of `coldstill evaluate` is of no student of the compared runs."""
