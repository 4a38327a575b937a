"""The named errors of training. Those of the dataset and of its tokenizer are in `storage_schema.errors`."""

from __future__ import annotations

from storage_schema.errors import ColdstillError


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
