"""The length of a run, against simple counting."""

from __future__ import annotations

import itertools
import math

import pytest
from transformers import TrainingArguments

from coldstill.trainer.arguments import adapt_arguments


def arguments(tmp_path, **changes) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **changes)


@pytest.mark.parametrize(
    ("epochs", "batches", "accumulation"), [*itertools.product((0.3, 1, 2.5), (1, 7, 12), (1, 2, 5))]
)
def test_epochs_take_every_batch_once_in_whole_steps_and_a_last_one(tmp_path, epochs, batches, accumulation):
    args = arguments(tmp_path, num_train_epochs=epochs, gradient_accumulation_steps=accumulation)
    changed, length = adapt_arguments(args, batches_per_epoch=batches, use_cache=True)
    taken = math.ceil(epochs * batches)
    steps = [list(range(taken))[start : start + accumulation] for start in range(0, taken, accumulation)]
    assert (length.micro_batches, length.steps, changed.max_steps) == (taken, len(steps), len(steps))
    assert length.epoch_after(len(steps)) == pytest.approx(taken / batches)


def test_max_steps_wins_over_epochs(tmp_path):
    args = arguments(tmp_path, max_steps=5, num_train_epochs=9, gradient_accumulation_steps=3)
    assert adapt_arguments(args, batches_per_epoch=4, use_cache=True)[1].micro_batches == 15


def test_the_user_s_own_arguments_stay_as_they_are(tmp_path):
    args = arguments(tmp_path, eval_strategy="epoch", logging_strategy="epoch", save_strategy="epoch")
    before = args.to_dict()
    changed, _ = adapt_arguments(args, batches_per_epoch=10, use_cache=False)
    assert args.to_dict() == before
    assert (changed.eval_strategy, changed.logging_strategy, changed.save_strategy) == ("steps",) * 3
    assert (changed.eval_steps, changed.logging_steps, changed.save_steps) == (10, 10, 10)
