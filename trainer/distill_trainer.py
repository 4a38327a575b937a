"""`DistillTrainer`: transformers' Trainer, learning from a logit dataset. A model and a `LogitDataset` come in.

Shape letters: `B` rows, `T` tokens, `M` target positions, `V` ids of the tokenizer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_utils import speed_metrics
from transformers.utils import logging

from .arguments import adapted, refuse_arguments
from .config import StudentConfig
from .data import LogitDataset
from .evaluation import draws_per_position, evaluate_student
from .loader import batch_loader, model_inputs
from .losses import PluginLoss, read_loss
from .losses.base import Loss, build_objective, state_of
from .model_card import model_card
from .resume import ResumePoint, data_order, resume_point
from .run_folder import newest_checkpoint
from .step_record import StepRecord
from .student import check_head, check_packing, check_tokenizer, distil_in_forward, innermost, load_student

logger = logging.get_logger(__name__)


class DistillTrainer(Trainer):
    """The loss of an optimizer step is the sum over its targets, divided once by their number.

    So neither padding nor packing, accumulation or the number of devices changes the gradient. t of TAID moves once per
    optimizer step, from the mean over all its targets, and stands still in evaluation.
    """

    # Read by Trainer: our loss is divided by the targets of the whole step already.
    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        model: torch.nn.Module | str,
        args: TrainingArguments | None = None,
        *,
        train_dataset: LogitDataset,
        loss: str | Mapping[str, Any] | Loss | PluginLoss = "taid",
        pack_length: int | None = None,
        fused_head: bool = True,
        eval_dataset: LogitDataset | dict[str, LogitDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        """`model`: a causal LM of transformers, one with peft adapters, or a folder or hub name.

        `loss`: a name such as taid, forward_kl or cross_entropy, a mapping such as {"name": "js", "beta": 0.5}, or an
        object such as `Taid(t_start=0.2)`, also of a class of your own. `pack_length`: tokens of a pack; None pads each
        row of a batch. With `fused_head` False the loss is taken from the model's own logits.
        `processing_class`: the student's tokenizer, checked against the dataset's and saved with each checkpoint.
        `args.data_seed` (`args.seed` where it is None) decides the order of the rows. Other arguments are Trainer's.

        Raises `TokenizerMismatch`, `StudentHeadTooSmall`, `PackingUnsupported`, what `read_loss` and
        `build_objective` raise, and `ValueError` for arguments that would lose what a checkpoint must keep.
        """
        args = args or TrainingArguments("trainer_output")
        refuse_arguments(args)
        self.distillation_loss = read_loss(loss)
        header = train_dataset.header
        student = load_student(StudentConfig(model=model), header) if isinstance(model, str) else model
        name = innermost(student).config.name_or_path or type(innermost(student)).__name__
        check_head(innermost(student), header, name=name)
        if processing_class is not None and processing_class.is_fast:
            check_tokenizer(processing_class.backend_tokenizer.to_str().encode(), header, name=name)
        self.objective = build_objective(
            self.distillation_loss,
            draws=train_dataset.draws,
            mean_tail_mass=train_dataset.mean_tail_mass(),
            dense=train_dataset.is_dense,
            draw_logprobs=train_dataset.draw_logprobs,
        )
        self.order = data_order(args, train_dataset, pack_length=pack_length)
        of_all_devices = train_dataset.stream(
            batch_size=args.per_device_train_batch_size, seed=self.order["seed"], pack_length=pack_length
        )
        args, self.length = adapted(
            args,
            batches_per_epoch=of_all_devices.batches_per_epoch,
            use_cache=getattr(innermost(student).config, "use_cache", True),
        )
        self.record = StepRecord(
            self.distillation_loss.new_schedule(), state_of(self.objective), order=self.order, length=self.length
        )
        self._resumed = ResumePoint()
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            # Before the user's: what they look at on a step's end is up to date.
            callbacks=[self.record, *(callbacks or [])],
            optimizers=optimizers,
        )
        with self.accelerator.autocast():
            self.head = distil_in_forward(self.model, token_count=header.token_count, fused=fused_head)
            if pack_length is not None:
                check_packing(innermost(self.model), batch_size=args.per_device_train_batch_size)
        if self.head.formula is None and fused_head:
            logger.warning(
                f"the loss of {name} is taken from its own logits, which takes more memory: {self.head.reason}"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's. A resumed run goes on with exactly the batches that an unbroken one would have had next.

        `True` takes the newest checkpoint that was written to its end. Raises `CheckpointMismatch` for one of another
        dataset or another order of rows, and `NonFiniteLoss`.
        """
        if resume_from_checkpoint is True and (newest := newest_checkpoint(Path(self.args.output_dir))) is not None:
            resume_from_checkpoint = str(newest.folder)
        self._resumed = ResumePoint()
        if isinstance(resume_from_checkpoint, str):
            self._resumed = resume_point(Path(resume_from_checkpoint), self.order)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Batches without an end, from where the checkpoint left off; accelerate is not asked to cut them again."""
        return self._batches(self.train_dataset, batch_size=self._train_batch_size, after=self._resumed.cursor)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        """What is left of the run, as one pass over a loader that begins at the next batch.

        Trainer takes the last step's number of batches from the pass's length: on resuming it must be what is left.
        """
        values = list(super().set_initial_training_values(args, dataloader))
        left = self.length.steps - self._resumed.step
        per_pass = max(1, left)
        values[0] = self._resumed.step // per_pass + (1 if left > 0 else 0)
        values[1] = per_pass
        values[5] = self.length.micro_batches - self._resumed.step * self.length.accumulation
        return tuple(values)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """The micro-batches of one optimizer step, and the number of their targets on all devices."""
        batches = list(islice(epoch_iterator, num_batches))
        count = sum(batch["targets"].count for batch in batches)
        if self.args.world_size > 1:
            count = int(self.accelerator.reduce(torch.tensor(count, device=device), "sum"))
        self.record.open_step(targets=count, cursor=batches[-1]["cursor"])
        return batches, count

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Loss of one micro-batch as its share of the optimizer step's mean; out of training its own mean."""
        total = inputs["targets"].count if num_items_in_batch is None else int(num_items_in_batch)
        # The backward pass averages over devices; the sum was meant.
        devices = self.accelerator.num_processes if model.training else 1
        outputs = model(
            **model_inputs(inputs),
            targets=inputs["targets"].to(self.args.device, non_blocking=True),
            objective=self.objective,
            t=1.0 if self.record.schedule is None else self.record.schedule.t,
            weight=devices / max(1, total),
        )
        if model.training:
            self.record.add(outputs["values"], inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def evaluate(
        self,
        eval_dataset: LogitDataset | dict[str, LogitDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the student as `evaluate_student` does; the same names, with `eval_` before them.

        `eval_loss` does not depend on t: the cross-entropy for that loss, else the best figure of KL(teacher ||
        student) that the dataset allows. t, the order of rows and random numbers are left alone.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluate() needs an eval_dataset, here or in DistillTrainer(...)")
        if isinstance(dataset, dict):
            parts = {
                name: self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items()
            }
            return {key: value for part in parts.values() for key, value in part.items()}
        began = time.time()
        batches = self._batches(dataset, batch_size=self.args.eval_batch_size, epochs=1)
        with self.accelerator.autocast():
            found = evaluate_student(
                self.model,
                batches,
                token_count=dataset.header.token_count,
                draws=draws_per_position(dataset),
                reduce=lambda sums: self.accelerator.reduce(sums, "sum"),
            ).metrics()
        found = {"loss": found[self._eval_loss(found)], **found}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics |= speed_metrics(metric_key_prefix, began, num_samples=dataset.rows)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training lines also carry `bucket_kl`, and with TAID `taid_t` (of the next step) and `taid_momentum`."""
        if "loss" in logs:
            logs = {**logs, **self.record.take_logs()}
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md` into the output folder: which dataset, which loss, which t."""
        if self.is_world_process_zero():
            card = model_card(
                student=innermost(self.model).config.name_or_path,
                headers=[source.header for source in self.train_dataset.sources.datasets],
                dataset_ids=self.train_dataset.dataset_ids,
                loss=self.distillation_loss,
                record=self.record.state()["attributes"],
                steps=self.state.global_step,
                adapters=innermost(self.model) is not self.model,
            )
            Path(self.args.output_dir, "README.md").write_text(card, encoding="utf-8")

    def _eval_loss(self, found: Mapping[str, float]) -> str:
        return next(name for name in self.distillation_loss.eval_loss if name in found)

    def _batches(
        self, dataset: LogitDataset, *, batch_size: int, epochs: int | None = None, after: dict[str, Any] | None = None
    ) -> DataLoader:
        """This device's batches: behind the cursor `after` in the order of training, or `epochs` times as stored."""
        stream = dataset.stream(
            batch_size=batch_size,
            seed=self.order["seed"],
            pack_length=self.order["pack_length"],
            epochs=epochs,
            shuffle=epochs is None,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        stream.seek(after)
        return batch_loader(stream, self.args)
