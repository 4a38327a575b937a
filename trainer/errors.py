"""All error classes of training. Those of datasets and tokenizers are in `storage_schema.errors`."""

from __future__ import annotations

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.errors import TokenizerMismatch


class UnsupportedArgument(ColdstillError, ValueError):
    """An argument of transformers' Trainer, or a value of one, that training from stored log-probs cannot honor.

    Fix: remove the argument, or set the value that the message names.
    """


class UnknownMetric(ColdstillError):
    """No evaluation of the run measures the metric that selects the best checkpoint.

    Fix: set `training.best_metric` to a metric that the message lists.
    """


class InvalidMixture(ColdstillError):
    """Datasets or weights that cannot be mixed.

    Fix: give one positive weight for each dataset, and name each dataset once.
    """


class EnsembleMismatch(ColdstillError):
    """The datasets of an ensemble do not hold the same rows.

    Fix: remove the rows that only one of the datasets has: the message holds the `coldstill subset` command.
    """


class NoTargets(ColdstillError):
    """A dataset has no target position, so nothing can be learned from it.

    Fix: capture again; the dataset's `rejects/` folder lists why each row was rejected.
    """


class MoreThanStored(ColdstillError):
    """A setting requests more kept ids or draws than the dataset holds.

    Fix: lower `data.top_k` or `data.draws`, or set them to null to use all that is stored.
    """


class RowTooLong(ColdstillError):
    """A row has more tokens than a pack holds, than the student has positions, or than its context with the row's
    images expanded; rows are never split.

    Fix: raise `training.pack_length` to the longest row, choose a student with a longer context, or make a dataset
    without such rows with `coldstill subset`.
    """


class StudentSeesNoImages(ColdstillError):
    """A row has images, and the student reads text alone.

    Fix: set `data.rows: without_images` to use the other rows only, or choose a vision-language model.
    """


class ImageTokenMismatch(ColdstillError):
    """The student's configuration and its processor name different tokens for the patches of an image.

    Fix: set `image_token_id` in the student's config.json to the id that its tokenizer has for the image token.
    """


class NothingToFreeze(ColdstillError):
    """No weight of the student has a name that `student.freeze` lists.

    Fix: correct or remove this name.
    """


class CursorMismatch(ColdstillError):
    """A cursor belongs to another sequence of rows: another dataset, seed, order or pack length.

    Fix: resume with the datasets and settings of the interrupted run, or start a new run.
    """


class LoaderWorkerDied(ColdstillError):
    """A process of the data loader ended, killed by a signal: most often SIGKILL, when memory ran out.

    Fix: lower `training.dataloader_workers`, or free memory, and re-run the same command to resume from the newest
    checkpoint.
    """


class StudentNotFound(ColdstillError):
    """No model that transformers can load has this path or name.

    Fix: check `student.model` or `student.from_scratch` of a training, or the argument of `coldstill evaluate`; without
    network access, download a Hub model first.
    """


class TokenizerNotAligned(TokenizerMismatch):
    """The text of a teacher's tokens cannot be aligned with the tokens of a student that has another tokenizer.

    Fix: choose a student with the teacher's tokenizer, or capture again with a tokenizer that keeps every byte and
    holds its chat template.
    """


class OtherTokenizerUnsupported(ColdstillError):
    """A setting that a student with another tokenizer than the dataset's cannot be trained with.

    Fix: change this setting, or choose a student with the teacher's tokenizer.
    """


class StudentHeadTooSmall(ColdstillError):
    """The student's head has fewer rows than the dataset's tokenizer has ids.

    Fix: call `model.resize_token_embeddings` with the dataset's number of ids, and save the student again. For
    `student.from_scratch`, set `vocab_size` to this number.
    """


class AdapterMisfit(ColdstillError):
    """No layer of the student has a name in `student.lora.target_modules`, or no weight of it is trained.

    Fix: name layers that the student has in `student.lora.target_modules`; for adapters that you load yourself, pass
    `is_trainable=True` to peft.
    """


class SpecialTokenInvalid(ColdstillError):
    """A begin, end or padding token in `student.from_scratch` is no id of the dataset's tokenizer.

    Fix: remove the key: the dataset's tokenizer has these tokens.
    """


class WrapperUnsupported(ColdstillError):
    """A wrapper around the student changes the sequence in a way that training cannot follow.

    Fix: train adapters inside the layers, such as LoRA.
    """


class StudentDiffers(ColdstillError):
    """The finished student, loaded again, does not give the logits of the trained model.

    Fix: use the trained weights in the checkpoint that the message names, and save the student again with a model class
    that loads as it was trained.
    """


class PackingUnsupported(ColdstillError):
    """The student attends across the rows of a pack.

    Fix: set `training.pack_length` to null.
    """


class ExtraLossUnsupported(ColdstillError):
    """The student's configuration requests an auxiliary loss that its class does not compute.

    Fix: set `output_router_logits` to false in the student's config.json.
    """


class AttentionMismatch(ColdstillError):
    """The student attends to later tokens, or the named implementation of attention is wrong for it.

    Fix: set `student.attention` to sdpa or to null.
    """


class NoDraws(ColdstillError):
    """The loss needs tail draws, and the dataset was captured without them.

    Fix: set `loss.tail` to auto or bucket, or capture the dataset again with draws.
    """


class NoDrawLogprobs(ColdstillError):
    """The mass-corrected tail needs the log-probs of the draws, and the dataset does not hold them.

    Fix: set `loss.tail: mixture`, or capture again with `teacher.draw_logprobs: true`.
    """


class DenseLossOnly(ColdstillError):
    """The loss needs all log-probs of the vocabulary, and the dataset holds a part of them.

    Fix: choose another loss, such as taid or forward_kl.
    """


class NotStudentRows(ColdstillError):
    """The loss needs rows that the student wrote, and another model or the source wrote those of a dataset.

    Fix: make the rows with `coldstill rounds`, or set `loss.any_rows: true` to accept rows of other writers.
    """


class NonFiniteLoss(ColdstillError):
    """The loss of some rows is not finite; training stopped before the optimizer step.

    Fix: lower `training.learning_rate`; if the first step fails, look at these rows with `coldstill inspect`.
    """


class NonFiniteGradient(ColdstillError):
    """The gradient of an optimizer step is not finite; training stopped before the optimizer step.

    Fix: lower `training.learning_rate`, or set `student.dtype` or `student.weights` to float32.
    """


class VanishedGradient(ColdstillError):
    """The gradient has been almost zero for many optimizer steps although the loss is not: the student learns nothing.

    Fix: resume from an older checkpoint or start again, with a lower `training.learning_rate`, with `loss: taid` or
    `loss: forward_kl`, or with `tail: forward_kl` of `reverse_kl`. A reverse KL has no gradient once the student's mass
    has left the ids that the dataset keeps.
    """


class NonFiniteWeights(ColdstillError):
    """The student's own weights hold values that are not finite.

    Fix: choose another student; if a checkpoint holds such weights, delete it to resume from the one before.
    """


class CheckpointDamaged(ColdstillError):
    """A file of a checkpoint is missing, or is not as it was written.

    Fix: copy it again from where it is whole, or delete it to resume from an older one.
    """


class CheckpointMismatch(ColdstillError):
    """The output folder or a checkpoint belongs to another run: another dataset, loss, data order or recipe.

    Fix: resume with the dataset and settings of that run, or start a new run in another output folder.
    """


class TeacherSawAnotherPrompt(ColdstillError):
    """The dataset's teacher saw another prompt than the rows have, so a resident teacher cannot be compared with it.

    Fix: evaluate without the resident teacher: the figures from the cache are exact.
    """


class NonFiniteLogits(ColdstillError):
    """The logits of a model under evaluation are not finite.

    Fix: look at these rows with `coldstill inspect`; if all rows fail, try dtype float32 or another checkpoint of this
    model.
    """


class NoAnswers(ColdstillError):
    """ROUGE needs reference answers, and no row of the dataset has a prompt and an answer.

    Fix: leave out `--rouge` for this dataset.
    """


class TaskFailed(ColdstillError):
    """A benchmark task cannot be found, read or run.

    Fix: list the names with `lm-eval ls tasks`; check a file with `lm-eval validate --tasks FILE`.
    """


class RunNotFound(ColdstillError):
    """A folder is not the output of a training.

    Fix: name the `output` of a training that has begun.
    """


class RunDamaged(ColdstillError):
    """A file of a run's output cannot be read as what a training writes there.

    Fix: copy the run's folder again from where it is whole, or re-run the training to write the file anew.
    """


class EvaluationNotOfRun(ColdstillError):
    """A report of `coldstill evaluate` is of no student of the compared runs.

    Fix: leave the report out, or name the run of its student too.
    """
