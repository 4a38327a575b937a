"""`DistillTrainer`: transformers' Trainer, learning from sparse targets. Batches of `trainer.data` come in.

Shape letters: `B` rows, `T` tokens, `M` target positions, `V` ids of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from .data import StreamingRows, collate
from .errors import NonFiniteLoss
from .losses import LossValues, SparseLoss, TaidSchedule
from .step_record import StepRecord
from .targets import SparseTargets


class DistillTrainer(Trainer):
    """The loss of an optimizer step is the sum over its targets, divided once by their number.

    So neither padding nor gradient accumulation nor the number of devices changes the gradient. t of TAID moves once
    per optimizer step, from the mean over all its targets, and stands still in evaluation.
    """

    # Read by Trainer: our loss is divided by the targets of the whole step already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        train_dataset: StreamingRows,
        loss: SparseLoss,
        schedule: TaidSchedule | None = None,
        eval_dataset: StreamingRows | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        """`schedule` moves t; without one t is 1. Raises `ValueError` for arguments that would lose what it needs."""
        if args.remove_unused_columns or args.restore_callback_states_from_checkpoint:
            raise ValueError("set remove_unused_columns=False and restore_callback_states_from_checkpoint=False")
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        self.loss, self.schedule = loss, schedule
        self.token_count = train_dataset.dataset.header.token_count
        self.record = StepRecord(schedule, reduce=lambda sums: self.accelerator.reduce(sums, "sum"))
        self.add_callback(self.record)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of one optimizer step, and the number of their targets on all devices.

        Trainer's own count looks at `labels[:, 1:]`, as it expects labels that are still to be shifted.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(batch["targets"].count for batch in batches), device=device)
        return batches, self.accelerator.reduce(count, "sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Loss of one micro-batch as its share of the optimizer step's mean; in evaluation its own mean.

        Raises `NonFiniteLoss` before the backward pass, so the weights stay as they were.
        """
        targets = inputs["targets"].to(self.args.device)
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        logits = outputs.logits[targets.row, targets.position, : self.token_count]
        values = self.loss(logits, targets, t=1.0 if self.schedule is None else self.schedule.t)
        self._check_finite(values, targets, inputs["sample_ids"])
        if not model.training:
            loss = values.loss.mean()
        else:
            total = targets.count if num_items_in_batch is None else int(num_items_in_batch)
            self.record.add(values, targets_of_step=total)
            # The backward pass averages over devices; the sum was meant.
            loss = values.loss.sum() * (self.accelerator.num_processes / total)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training lines also carry `bucket_kl`, and with TAID `taid_t` (of the next step) and `taid_momentum`."""
        if "loss" in logs:
            logs = {**logs, **self.record.take_logs()}
        super().log(logs, start_time)

    def _check_finite(self, values: LossValues, targets: SparseTargets, sample_ids: list[str]) -> None:
        broken = ~values.loss.detach().isfinite()
        if broken.any():
            rows = sorted({sample_ids[row] for row in targets.row[broken].tolist()})
            raise NonFiniteLoss(
                f"loss of rows {', '.join(rows)} at optimizer step {self.state.global_step + 1}",
                found=f"{int(broken.sum())} of {targets.count} values that are not finite",
                wanted="a finite loss; the optimizer was stopped before this step",
                fix="lower training.learning_rate; if the very first step fails, look at these rows of the dataset",
            )
