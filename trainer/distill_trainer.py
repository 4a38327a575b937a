"""`DistillTrainer`: the Trainer of transformers with a distillation loss on a `LogitDataset`.

Shape letters: `B` rows, `T` tokens, `M` target positions, `V` ids of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from .alignment.evaluation import RANKING
from .alignment.student import AlignedStudent
from .arguments import adapt_arguments, rank_by_metric, validate_arguments, validate_parameters
from .checkpoint_files import begin_checkpoint, finish_checkpoint
from .checkpoints import Checkpoint, ResumePoint, data_order, newest_checkpoint, resume_point
from .config import OtherTokenizerConfig, StudentConfig
from .data.logit_dataset import LogitDataset, check_eval_dataset, require_logit_dataset
from .data.stream import LogitStream
from .finished_student import TrainedLogits, first_row, model_card
from .interruption import naming_dead_workers
from .loss_kernels.fused_head import Objective
from .losses import PluginLoss, read_loss
from .losses.base import Loss, build_objective, join_objectives, state_of
from .run_report.callback import RunReport
from .run_report.facts import RunFacts
from .run_report.pace import with_end_time
from .sharding import is_sharded, resharding, validate_sharded_student, whole
from .step_record import StepRecord, figures_of, require_finite_weights
from .student.forward import distill_in_forward, innermost, model_inputs
from .student.images import check_dataset_images, image_probe, images_of
from .student.load import check_attention, check_trainable
from .student.packing_check import check_packing
from .student.positions import check_lengths, context_of, room_of
from .student.tokenizer import checked_student, files_to_save
from .student.tokenizer import other_tokenizer as read_other_tokenizer
from .student.wrapper import check_wrapping
from .student.writer import check_writers
from .trainer_evaluation import EvaluatingTrainer
from .training_loop import BatchLoader

logger = logging.get_logger(__name__)


class DistillTrainer(EvaluatingTrainer):
    """Divides the summed loss of an optimizer step once, by the number of its targets on all devices.

    So padding, packing, accumulation and the number of devices do not change the gradient. t of TAID is updated once
    per optimizer step, from the mean loss over all its targets, and never in evaluation.
    """

    # Read by Trainer: the loss is already divided by the targets of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: torch.nn.Module | str | StudentConfig,
        args: TrainingArguments | None = None,
        *,
        train_dataset: LogitDataset,
        loss: str | Mapping[str, Any] | Loss | PluginLoss = "taid",
        pack_length: int | None = None,
        fused_head: bool = True,
        report: bool = True,
        other_tokenizer: OtherTokenizerConfig | None = None,
        eval_dataset: LogitDataset | dict[str, LogitDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        **unsupported: Any,
    ):
        """Check that student and dataset fit, and build the loss.

        - `model`: a causal LM of transformers, one with peft adapters, a folder or hub name, or a `StudentConfig`.
        - `loss`: a name such as taid, forward_kl or cross_entropy, a mapping such as {"name": "js", "beta": 0.5}, or an
          object such as `Taid(t_start=0.2)`, also of your own class.
        - `pack_length`: tokens of a pack; None pads each row of a batch to the longest.
        - `fused_head`: compute the head and the loss in chunks; False uses the logits of the model's own forward pass.
        - `report`: write the page of the run, `report.html`, into the output folder (docs/run_report.md).
        - `processing_class`: the student's tokenizer or processor, saved with the student and with each checkpoint; by
          default the one beside its weights, or else the dataset's tokenizer. It is compared with the dataset's, and so
          is the tokenizer beside the weights of a student given by name. A model object without `processing_class` is
          compared by its `name_or_path`; a warning is logged if there is no tokenizer.
        - `other_tokenizer`: how a student learns whose tokenizer is not the dataset's (docs/other_tokenizer.md).
        - A model that sees images reads them by the processor given, or by the one beside its weights; without one it
          is trained on text alone.
        - `unsupported`: other parameters of Trainer; the error says what to do instead.

        `args.data_seed`, or `args.seed` if it is None, determines the order of the rows. Other arguments are those of
        Trainer.

        Raises `TokenizerMismatch`, `TokenizerNotAligned`, `OtherTokenizerUnsupported`, `StudentHeadTooSmall`,
        `AdapterMisfit`, `AttentionMismatch`, `ExtraLossUnsupported`, `PackingUnsupported`, `WrapperUnsupported`,
        `UnknownMetric`, `RowTooLong`, `StudentSeesNoImages`, `ProcessorUnusable`, `ImageTokenMismatch`,
        `NotStudentRows`, what `read_loss` and `build_objective` raise, and `UnsupportedArgument` for arguments that
        would have no effect or lose state.
        """
        validate_parameters(unsupported)
        args = args or TrainingArguments("trainer_output")
        validate_arguments(args)
        require_logit_dataset(train_dataset, name="train_dataset")
        if eval_dataset is not None:
            check_eval_dataset(eval_dataset, train_dataset)
        self.distillation_loss = read_loss(loss)
        other = read_other_tokenizer(model, train_dataset, processing_class)
        args = rank_by_metric(args, eval_dataset, only=RANKING if other else None)
        of_tokenizer = other_tokenizer or OtherTokenizerConfig()
        self.aligned = AlignedStudent(other, of_tokenizer, train_dataset) if other else None
        header = self.aligned.header if self.aligned else train_dataset.header
        own = header if self.aligned else None
        student, name = checked_student(model, train_dataset, processing_class, own_header=own)
        check_trainable(student, name=name)
        given = processing_class is not None
        self._files = {} if given else files_to_save(model, train_dataset.sources.datasets[0])
        self.images = images_of(student)
        evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, Mapping) else [eval_dataset]
        evaluated = [part for part in evaluated if part is not None]
        for part in (train_dataset, *evaluated):
            check_dataset_images(part, self.images, innermost(student), name=name, packs=pack_length is not None)
            if self.aligned is None:  # whose rows have other lengths, and are measured one by one
                check_lengths(part, student, name=name)
        if self.aligned:
            self.objective: Objective = self.aligned.prepare(
                train_dataset,
                self.distillation_loss,
                evaluated=evaluated,
                pack_length=pack_length,
                context=room_of(context_of(innermost(student).config), student),
                sees_images=self.images is not None,
            )
        else:
            objectives = [build_objective(self.distillation_loss, **part.facts()) for part in train_dataset.by_teacher]
            self.objective = join_objectives(objectives, train_dataset.ensemble_weights)
        check_writers(self.distillation_loss, train_dataset, model)
        self.order = data_order(args, train_dataset, pack_length=pack_length, images=self.images, own_header=own)
        of_all_devices = train_dataset.stream(
            batch_size=args.per_device_train_batch_size, seed=self.order["seed"], pack_length=pack_length
        )
        args, self.length = adapt_arguments(
            args,
            batches_per_epoch=of_all_devices.batches_per_epoch,
            use_cache=getattr(innermost(student).config, "use_cache", True),
        )
        self.record = StepRecord(
            self.distillation_loss.new_schedule(), state_of(self.objective), order=self.order, length=self.length
        )
        self._report: RunReport | None = None
        if report:
            self._report = RunReport(
                args.output_dir,
                lambda: RunFacts.of_arguments(
                    args, self.distillation_loss, train_dataset, student=name, pack_length=pack_length
                ),
                write=args.process_index == 0,
            )
        self._resumed = ResumePoint()
        self._row: torch.Tensor | None = None
        if self.images is not None and args.ddp_find_unused_parameters is None:
            # A batch without images leaves the vision tower of this device without a gradient.
            args.ddp_find_unused_parameters = True
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            # Before the user's callbacks, so that these read an updated record at the end of a step.
            callbacks=[self.record, *([self._report] if self._report else []), *(callbacks or [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        with_end_time(self)
        if self.is_fsdp_enabled:
            self.model.to(self.args.device)  # for the checks; it is sharded from there when the training begins
        check_attention(innermost(self.model), name=name)
        with self.accelerator.autocast():
            self.head = distill_in_forward(self.model, token_count=header.token_count, fused=fused_head)
            check_wrapping(
                self.model,
                self.head.wrapping,
                packs=pack_length is not None,
                recomputes=self.args.gradient_checkpointing,
            )
            if pack_length is not None:
                check_packing(
                    innermost(self.model),
                    batch_size=args.per_device_train_batch_size,
                    pack_length=pack_length,
                    formula=self.head.formula,
                )
        if self.is_fsdp_enabled:
            aligned = self.aligned is not None
            validate_sharded_student(
                self.model, self.head, images=self.images, mixed=self.args.bf16, is_aligned=aligned
            )
        if self.head.formula is None and fused_head:
            logger.warning(
                f"the loss of {name} is taken from its own logits, which needs more memory: {self.head.reason}"
            )

    def train(self, resume_from_checkpoint: str | Path | bool | Checkpoint | None = None, **kwargs: Any) -> Any:
        """Train, or resume with exactly the batches that an uninterrupted run would use next.

        `resume_from_checkpoint`: a folder, or `True` for the newest whole checkpoint in the output folder; one that
        `newest_checkpoint` returned is not read again.

        Raises `CheckpointMismatch` for a checkpoint of another dataset, data order or loss, `CheckpointDamaged`,
        `NonFiniteLoss`, `NonFiniteGradient`, `NonFiniteWeights`, `LoaderWorkerDied`, and what a `LogitStream` raises.
        """
        whole = resume_from_checkpoint if isinstance(resume_from_checkpoint, Checkpoint) else None
        if resume_from_checkpoint is True:
            output = Path(self.args.output_dir)
            whole = newest_checkpoint(output)
            if whole is None and any(output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
                resume_from_checkpoint = None  # all are damaged, which was said: transformers would read one of them
        if whole is not None:
            resume_from_checkpoint = whole.folder
        self._resumed = ResumePoint()
        if isinstance(resume_from_checkpoint, str | Path):
            self._resumed = resume_point(Path(resume_from_checkpoint), self.order, is_whole=whole is not None)
            resume_from_checkpoint = str(resume_from_checkpoint)
        with self._report or nullcontext(), naming_dead_workers():
            found = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._use_averaged_weights()
        if self._report:
            self._report.finish(vars(self.state), figures_of(self.record.state()["attributes"]))
        return found

    def get_train_dataloader(self) -> BatchLoader:
        """This device's batches from the resume point to the end of the run."""
        stream = self._stream(self.train_dataset, batch_size=self.args.train_batch_size)
        stream.seek(self._resumed.cursor)
        return BatchLoader(stream, self.args, batches=self.length.micro_batches_after(self._resumed.step))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the list of the checkpoint's files last; of all devices, once each has written its own.

        Raises `NonFiniteWeights`: a run that resumes from such weights would fail again and again.
        """
        require_finite_weights(self.model)
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        # What the weights compute: the finished student is held against it. Each device takes part if it is sharded.
        trained = self._trained_logits() if self.args.should_save or is_sharded(self.model) else None
        if self.args.should_save:
            begin_checkpoint(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if trained is not None:
                trained.write(folder)
            finish_checkpoint(folder)
            # Not before: until here, an older one may be the only one that outlasts a power cut.
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder.parent), limit, best and str(folder.parent / Path(best).name), use_mtime=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the tokenizer too if none was given, byte for byte: a student without one cannot be served."""
        super()._save(output_dir, state_dict=state_dict)
        for name, data in self._files.items():
            Path(output_dir or self.args.output_dir, name).write_bytes(data)

    def _trained_logits(self) -> TrainedLogits | None:
        if self._row is None:
            return None
        self._use_averaged_weights()
        row = (self._row,) if self.images is None else image_probe(self.images, innermost(self.model))
        with resharding(self.model):
            return TrainedLogits.of(self.model, *row)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Keep the norm for the check before the optimizer step."""
        norm = whole(super()._get_grad_norm(model, grad_norm=grad_norm))
        if self.accelerator.scaler is None and norm is not None:
            self.record.gradient_norm = norm
        return norm

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """The micro-batches of one optimizer step, and the number of their targets on all devices."""
        batches = list(islice(epoch_iterator, num_batches))
        count = sum(batch["targets"].count for batch in batches)
        if self.args.world_size > 1:
            count = int(self.accelerator.reduce(torch.tensor(count, device=device), "sum"))
        if self.aligned:
            self.aligned.count(batches)
        self.record.open_step(targets=count, cursor=batches[-1]["cursor"])
        self._row = first_row(batches[-1])
        return batches, count

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Loss of one micro-batch: its share of the optimizer step's mean in training, else its own mean."""
        total = inputs["targets"].count if num_items_in_batch is None else int(num_items_in_batch)
        # DDP averages gradients over devices; the loss is a sum over them.
        devices = self.accelerator.num_processes if model.training else 1
        outputs = model(
            **model_inputs(inputs, self.model),
            targets=inputs["targets"].to(self.args.device, non_blocking=True),
            objective=self.objective,
            t=1.0 if self.record.schedule is None else self.record.schedule.t,
            weight=devices / max(1, total),
        )
        if model.training:
            self.record.add(outputs["values"], inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `bucket_kl`, `targets_per_s` and `peak_memory_mb` to training lines, and with TAID `taid_t` (of the next
        step) and `taid_momentum`."""
        if "loss" in logs:
            logs = {**logs, **self.record.take_logs()}
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card `README.md` to the output folder."""
        if self.is_world_process_zero():
            card = model_card(
                student=innermost(self.model).config.name_or_path,
                headers=[source.header for source in self.train_dataset.all_datasets],
                dataset_ids=self.train_dataset.dataset_ids,
                shares=self.train_dataset.shares(),
                loss=self.distillation_loss,
                record=self.record.state()["attributes"],
                steps=self.state.global_step,
                adapters=innermost(self.model) is not self.model,
                sees_images=self.images is not None,
                draws=[part.draws for part in self.train_dataset.by_teacher],
            )
            Path(self.args.output_dir, "README.md").write_text(card, encoding="utf-8")

    def _stream(self, dataset: LogitDataset, *, batch_size: int, epochs: int | None = None) -> LogitStream:
        """This device's share of the batches: endless in the order of training, or `epochs` in stored order."""
        return dataset.stream(
            batch_size=batch_size,
            seed=self.order["seed"],
            pack_length=self.order["pack_length"],
            epochs=epochs,
            shuffle=epochs is None,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            images=self.images,
            collator=self.aligned.collator(dataset) if self.aligned else None,
        )
