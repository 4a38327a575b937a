"""How the Trainer of transformers evaluates a student on a `LogitDataset`, in a training and on its own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers.trainer_utils import speed_metrics

from .alignment.student import AlignedStudent
from .data.logit_dataset import LogitDataset, check_eval_dataset
from .data.stream import LogitStream
from .errors import UnsupportedArgument
from .evaluation.evaluate import evaluate_student
from .evaluation.figures import drawn_by_tail_mass, draws_per_position
from .interruption import naming_dead_workers
from .losses.base import Loss
from .sharding import is_sharded, resharding
from .training_loop import BatchLoader, TrainingLoop


class EvaluatingTrainer(TrainingLoop):
    """Measures with `evaluate_student`, each target position once on all devices together."""

    aligned: AlignedStudent | None
    distillation_loss: Loss

    def evaluate(
        self,
        eval_dataset: LogitDataset | dict[str, LogitDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the student as `evaluate_student` does, with `eval_` before each name.

        `eval_loss` does not depend on t. For the loss cross_entropy it is the cross-entropy, else the best figure of
        KL(teacher || student) that the dataset allows. t, the data order and random numbers do not change.
        """
        dataset = self._evaluated(eval_dataset)
        if isinstance(dataset, dict):
            parts = {
                name: self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items()
            }
            return {key: value for part in parts.values() for key, value in part.items()}
        self._memory_tracker.start()
        began = time.time()
        batches = self.get_eval_dataloader(dataset)
        self._use_averaged_weights()

        def reduce(sums: torch.Tensor) -> torch.Tensor:
            return self.accelerator.reduce(sums, "sum")

        with naming_dead_workers(), resharding(self.model), self.accelerator.autocast():
            if self.aligned:
                found = self.aligned.evaluate(self.model, batches, reduce=reduce)
            else:
                found = evaluate_student(
                    self.model,
                    batches,
                    token_count=dataset.header.token_count,
                    draws=draws_per_position(dataset),
                    by_tail_mass=drawn_by_tail_mass(dataset),
                    reduce=reduce,
                    sharded=is_sharded(self.model),
                ).metrics()
                found = {"loss": found[self._eval_loss_name(found)], **found}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics |= speed_metrics(metric_key_prefix, began, num_samples=dataset.rows)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def get_eval_dataloader(self, eval_dataset: LogitDataset | str | None = None) -> BatchLoader:
        """This device's batches of one pass over an evaluation dataset, in stored order.

        `eval_dataset`: a dataset, or the name of one given to `DistillTrainer`. Raises `TokenizerMismatch`.
        """
        dataset = self._evaluated(eval_dataset)
        if isinstance(dataset, dict):
            raise UnsupportedArgument(
                "get_eval_dataloader()",
                found=f"{len(dataset)} evaluation datasets",
                wanted="the name of one",
                fix=f"pass one of {', '.join(map(repr, dataset))}",
            )
        check_eval_dataset(dataset, self.train_dataset)
        return BatchLoader(self._stream(dataset, batch_size=self.args.eval_batch_size, epochs=1), self.args)

    def get_test_dataloader(self, test_dataset: Any) -> BatchLoader:
        """The same as `get_eval_dataloader` of this dataset."""
        found: BatchLoader = self.get_eval_dataloader(test_dataset)
        return found

    def predict(self, *_: Any, **__: Any) -> Any:
        """Raise `UnsupportedArgument`: the logits of all positions would not fit in memory."""
        raise UnsupportedArgument(
            "predict()",
            found="a request for the logits of all target positions",
            wanted="figures, which are measured in parts",
            fix="call evaluate(test_dataset, metric_key_prefix='test')",
        )

    def _evaluated(self, chosen: Any) -> Any:
        """The dataset or datasets that `chosen` means: a dataset, a name of one, or None for all of them."""
        dataset = self.eval_dataset if chosen is None else chosen
        if isinstance(dataset, str):
            named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if dataset not in named:
                raise UnsupportedArgument(
                    "eval_dataset",
                    found=repr(dataset),
                    wanted=f"one of {', '.join(map(repr, named))}" if named else "a dataset of load_logit_dataset",
                    fix="pass eval_dataset={NAME: dataset} to DistillTrainer",
                )
            return named[dataset]
        if dataset is None:
            raise ValueError("evaluate() needs an eval_dataset, here or in DistillTrainer(...)")
        return dataset

    def _eval_loss_name(self, found: Mapping[str, float]) -> str:
        return next(name for name in self.distillation_loss.eval_loss if name in found)

    def _stream(self, dataset: LogitDataset, *, batch_size: int, epochs: int | None = None) -> LogitStream:
        raise NotImplementedError
