"""What the training loop of transformers needs for an endless stream: its loader, epochs and weights.

`BatchLoader` has the length of a whole run. `TrainingLoop` tells callbacks where its epochs begin and end.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from .arguments import RunLength
from .checkpoints import load_saved_weights, whole_checkpoint
from .data.stream import LogitStream, PassingErrors, raising_passed
from .errors import UnsupportedArgument
from .interruption import naming_dead_workers, outlive_sigterm, worker_died
from .sharding import (
    gathered,
    is_sharded,
    keep_head_whole,
    load_optimizer_state,
    validate_activation_checkpointing,
    validate_sharded_optimizer,
    validate_sharding,
    whole_weights,
)

_ENDING_S = 1.0
"""Time for a killed process to be seen as ended."""


class BatchLoader(DataLoader):
    """A device's batches of a stream, cut after `batches` if given, and decoded in the processes that `args` set.

    Trainer derives the number of optimizer steps, and the micro-batches of the last one, from the length of its loader.
    So the loader of a resumed run has the length of the rest of the run. A finished run has the length 1: with less,
    Trainer would take the length as unknown and train again; with it, no epoch is left.
    """

    def __init__(self, stream: LogitStream, args: TrainingArguments, *, batches: int | None = None):
        workers = args.dataloader_num_workers
        super().__init__(
            PassingErrors(stream),
            batch_size=None,
            worker_init_fn=outlive_sigterm,
            num_workers=workers,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
            pin_memory=args.dataloader_pin_memory,
            # A separate generator: each pass draws a seed, which must not change the random numbers of dropout.
            generator=torch.Generator(),
        )
        self._batches = None if batches is None else max(1, batches)

    def __len__(self) -> int:
        """Batches of one pass. Raises `TypeError` if the loader has no bound."""
        if self._batches is None:
            raise TypeError("the length of this loader is not known")
        return self._batches

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Raises the named errors of the loader's processes as they are, and `LoaderWorkerDied`."""
        batches = super().__iter__()
        end = getattr(batches, "_shutdown_workers", lambda: None)
        # An uncaught error keeps this frame to the end of Python. There multiprocessing sends its processes SIGTERM,
        # which these outlive, and waits for them.
        atexit.register(end)
        try:
            with naming_dead_workers():
                try:
                    yield from islice(raising_passed(batches), self._batches)
                except (ConnectionError, EOFError):
                    # The memory of a batch was fetched from a process that ended meanwhile.
                    gone = [str(process.pid) for process in getattr(batches, "_workers", ()) if _has_ended(process)]
                    if not gone:
                        raise
                    raise worker_died(", ".join(gone)) from None
        finally:
            # torch would end its processes when the iterator is collected. After an error that is late: the cycle with
            # the traceback has taken down their queues, and each process is waited for in vain, five seconds long.
            atexit.unregister(end)
            end()


def _has_ended(process: Any) -> bool:
    process.join(_ENDING_S)
    return not process.is_alive()


class OnePass:
    """The batches of one pass over a loader: each `iter` continues where the one before ended."""

    def __init__(self, loader: Iterable[Any]):
        self._loader = loader
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._batches is None:
            self._batches = iter(self._loader)
        return self._batches


class TrainingLoop(Trainer):
    """The Trainer of transformers for one loader of the length of a run, for schedule-free optimizers, and for students
    that FSDP2 shards, whose checkpoints have the files of an unsharded run."""

    control: TrainerControl
    length: RunLength
    _loading: Path

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights that evaluation measures; transformers would save those of a schedule-free step. If they are
        sharded, call it on all devices."""
        self._use_averaged_weights()
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        weights = whole_weights(self.model, keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _run_epoch(
        self,
        *,
        train_dataloader: Iterable[Any],
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        resume_from_checkpoint: str | None,
        **rest: Any,
    ) -> None:
        """Split the one pass that transformers sees into the run's epochs, so that callbacks get the events of each.

        An epoch ends with the optimizer step that takes its last row, which may take rows of the next one.
        """
        batches, began = OnePass(train_dataloader), self.state.global_step
        for last in self.length.last_steps(began):
            first = self.state.global_step
            if first > began:
                self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
            super()._run_epoch(
                train_dataloader=batches,
                steps_in_epoch=self.length.micro_batches_after(first) - self.length.micro_batches_after(last),
                num_update_steps_per_epoch=last - first,
                # The random state of a checkpoint is restored once.
                resume_from_checkpoint=resume_from_checkpoint if first == began else None,
                **rest,
            )
            if self.control.should_epoch_stop:
                raise UnsupportedArgument(
                    "a callback's control.should_epoch_stop",
                    found=True,
                    wanted="False, because each epoch takes every row once",
                    fix="set control.should_training_stop to end the run",
                )
            if self.control.should_training_stop:
                return

    def _load_best_model(self) -> None:
        self._use_averaged_weights()
        assert self.state.best_model_checkpoint is not None
        # By its name: the run's folder may have been moved since. transformers would read on, or pass over it.
        best = Path(self.args.output_dir, Path(self.state.best_model_checkpoint).name)
        whole_checkpoint(best)
        self.state.best_model_checkpoint = str(best)
        self._loading = best
        if self.is_fsdp_enabled:
            load_saved_weights(self.model, best)
        else:
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._loading = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            load_saved_weights(self.model, self._loading)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def create_accelerator_and_postprocess(self) -> None:
        """Raise `UnsupportedArgument` for a way of sharding that training cannot honor."""
        validate_activation_checkpointing(self.args)
        super().create_accelerator_and_postprocess()
        validate_sharding(self.accelerator, self.args)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As transformers. Raises `UnsupportedArgument` for one that cannot train a sharded student."""
        found = super().create_optimizer(model)
        if self.is_fsdp_enabled:
            validate_sharded_optimizer(found)
        return found

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:
            keep_head_whole(self.model)
        return found

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gathered(self.optimizer.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True, mmap=True)
        load_optimizer_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Load the weights by the model's own class if their saved names are others than those in memory.

        transformers saves some families, such as LLaVA, under the names of their first release, and its Trainer would
        only warn that it loaded none of them. It would also warn of a tied head, which is saved as the embedding alone.
        """
        if load_result.unexpected_keys:
            load_saved_weights(self.model, self._loading)
            return
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        absent = set(load_result.missing_keys)
        loaded = {id(weight) for name, weight in weights.items() if name not in absent}
        missing = [name for name in load_result.missing_keys if id(weights.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _use_averaged_weights(self) -> None:
        """With a schedule-free optimizer, give the model the weights it is used with; the next step undoes it."""
        if callable(use := getattr(self.optimizer, "eval", None)):
            use()
