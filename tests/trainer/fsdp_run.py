"""The program of each of the two processes of `test_fsdp.py`; with torchrun:
`torchrun --nproc_per_node 2 -m tests.trainer.fsdp_run DATASET STUDENT OUTPUT CASES`, CASES `quick` or `slow`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM

from coldstill.common.errors import ColdstillError
from coldstill.trainer.config import LoraConfig, StudentConfig, TrainConfig
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.loss_kernels import fused_head
from coldstill.trainer.student.lora import with_adapters
from coldstill.trainer.train import train as train_whole_run
from tests import making
from tests.trainer.ddp_run import end, sick_row, train
from tests.trainer.training import build, weights_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp.yaml"
PLAIN = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3}
ADAM = {**PLAIN, "optim": "adamw_torch", "learning_rate": 1e-3}
PACKED = {**PLAIN, "pack_length": 40, "gradient_checkpointing": True, "max_steps": 2}


def adapted(student: Path) -> Any:
    """The student with LoRA adapters whose second factor is not 0, so that both have gradients."""
    torch.manual_seed(0)
    model = with_adapters(LlamaForCausalLM.from_pretrained(student), LoraConfig(r=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model


def frozen(student: Path) -> Any:
    """The student with a head and a layer that are not trained."""
    model = LlamaForCausalLM.from_pretrained(student)
    model.lm_head.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


def tied(student: Path) -> Any:
    """The student with one weight for its embeddings and its head."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig.from_pretrained(student, tie_word_embeddings=True))


@dataclass(frozen=True)
class Case:
    """A student made of a folder, and settings of its training."""

    shape: dict[str, Any]
    student: Callable[[Path], Any] = LlamaForCausalLM.from_pretrained

    @property
    def on_one(self) -> dict[str, Any]:
        """The settings of one process that takes the steps of two."""
        return {**self.shape, "gradient_accumulation_steps": 2 * self.shape["gradient_accumulation_steps"]}


CASES = {
    "taid, tied": Case(PLAIN, tied),
    "cross_entropy": Case({"loss": "cross_entropy", **PLAIN}),
    "cross_entropy, tied": Case({"loss": "cross_entropy", **PLAIN}, tied),
    "packed, gradient checkpointing": Case(PACKED),
    "adam": Case(ADAM),
    "tied, adam": Case(ADAM, tied),
    "own logits": Case({"fused_head": False, **PLAIN}),
    "lora": Case(ADAM, adapted),
    "frozen": Case(PLAIN, frozen),
}


def config_of(dataset: Path, student: Path, output: Path, *, dtype: str = "float32", **training: Any) -> TrainConfig:
    """A run of `coldstill train` with measurements and a best checkpoint."""
    return TrainConfig(
        dataset=str(dataset),
        output=str(output),
        student=StudentConfig(model=str(student), dtype=dtype),
        eval_dataset=str(dataset),
        training={
            "batch_size": 2,
            "learning_rate": 1e-3,
            "eval_steps": 2,
            "best_metric": "eval_loss",
            "dataloader_workers": 0,
            **training,
        },
    )


def killed_and_resumed(output: Path, *arguments: Any, **shape: Any) -> dict[str, Any]:
    """Results of a run that is killed in its fourth optimizer step."""
    train(*arguments, output, kill=2, **shape)
    return train(*arguments, output, **shape)


def best_of(dataset: Path, student: Path, output: Path) -> dict[str, Any]:
    """The best checkpoint of a run that gets worse, and the weights that the run ends with."""
    measured = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer, _ = build(
        dataset,
        student,
        output,
        eval_dataset=load_logit_dataset(dataset),
        metric_for_best_model="eval_loss",
        load_best_model_at_end=True,
        **{**ADAM, "learning_rate": 0.05, **measured},
    )
    trainer.train()
    return {"folder": trainer.state.best_model_checkpoint, "weights": weights_of(trainer.model)}


def gathers(dataset: Path, student: Path, output: Path) -> dict[str, int]:
    """Collectives of the forward and backward pass of one micro-batch, by the number of chunks of the loss."""
    trainer, _ = build(dataset, student, output, max_steps=1, gradient_accumulation_steps=2)
    trainer.accelerator.no_sync = None  # a call fails: a gradient that waits for others would wait whole
    trainer.train()
    trainer.model.train()
    batch = next(iter(load_logit_dataset(dataset).stream(batch_size=4, seed=0)))
    found, budget = {}, fused_head.CHUNK_BYTES["cpu"]
    for name, size in (("one chunk", budget), ("many chunks", 4 * making.VOCABULARY)):
        fused_head.CHUNK_BYTES["cpu"] = size
        with CommDebugMode() as counted:
            trainer.compute_loss(trainer.model, batch).backward()
        found[name] = {str(op): count for op, count in counted.get_comm_counts().items()}
    fused_head.CHUNK_BYTES["cpu"] = budget
    return found


def error_of(act: Callable[[], Any]) -> str:
    """The message of the named error that `act` raises."""
    try:
        act()
    except ColdstillError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def spoiled(student: Path) -> Any:
    """The student with a weight that is not finite, in the part of the second device."""
    model = LlamaForCausalLM.from_pretrained(student)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, 0] = torch.inf
    return model


@contextmanager
def unsharded() -> Iterator[None]:
    """DDP in the same processes."""
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    try:
        yield
    finally:
        os.environ["ACCELERATE_USE_FSDP"] = "true"


def quick(dataset: Path, student: Path, output: Path) -> dict[str, Any]:
    """What the quick tests read."""
    return {
        "taid": train(dataset, student, output / "taid", **PLAIN),
        "resumed": killed_and_resumed(output / "resumed", dataset, student, **PLAIN),
        "gathers": gathers(dataset, student, output / "gathers"),
        "sick row": sick_row(dataset, student, output / "sick"),
        "sick weight": error_of(lambda: build(dataset, spoiled(student), output / "bad", max_steps=1)[0].train()),
    }


def slow(dataset: Path, student: Path, output: Path) -> dict[str, Any]:
    """What the slow tests read: the results of training, by a name of `CASES` and what was done."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        found[name] = train(dataset, case.student(student), output / name, **case.shape)
    for name in ("tied, adam", "lora"):
        case = CASES[name]
        train(dataset, case.student(student), output / f"{name} killed", kill=2, **case.shape)
        found[f"{name}, resumed"] = train(dataset, case.student(student), output / f"{name} killed", **case.shape)
        with unsharded():
            found[f"{name}, ddp"] = train(dataset, case.student(student), output / f"{name} ddp", **case.shape)
            train(dataset, case.student(student), output / f"{name} from ddp", kill=2, **case.shape)
        found[f"{name}, from ddp"] = train(dataset, case.student(student), output / f"{name} from ddp", **case.shape)
        train(dataset, case.student(student), output / f"{name} to ddp", kill=2, **case.shape)
        with unsharded():
            found[f"{name}, to ddp"] = train(dataset, case.student(student), output / f"{name} to ddp", **case.shape)
    for name, dtype in (("run", "float32"), ("run in bfloat16", "bfloat16")):
        found[name] = train_whole_run(config_of(dataset, student, output / name, dtype=dtype)).model_dump()
    found["best"] = best_of(dataset, student, output / "best")
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer,Linear"
    found["gathers, head alone"] = gathers(dataset, student, output / "alone")
    return found


def launched(**changes: Any) -> dict[str, str]:
    """The environment that `accelerate launch --config_file examples/fsdp.yaml` gives its processes for FSDP; `changes`
    to the settings of the file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(EXAMPLE), "-m", "coldstill"])
    arguments, *_ = _validate_launch_command(arguments)
    for name, value in changes.items():
        setattr(arguments, name, value)
    return {name: value for name, value in prepare_multi_gpu_env(arguments).items() if "FSDP" in name}


def shard_on_the_cpu() -> None:
    """accelerate 1.15 reads a configuration of FSDP on accelerators only; torch shards on the CPU too."""
    plain = AcceleratorState.__init__

    def with_plugin(self: Any, *args: Any, fsdp_plugin: Any = None, **rest: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **rest)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = with_plugin


def main() -> None:
    """Write the results of this process to OUTPUT."""
    os.environ |= launched()
    shard_on_the_cpu()
    cases = {"quick": quick, "slow": slow}[sys.argv[4]]
    dataset, student, output = map(Path, sys.argv[1:4])
    end(cases(dataset, student, output), output)
    # torch keeps layouts of sharded tensors in caches, and with them the group of gloo, so its threads outlive it. Real
    # devices use NCCL, which ends with the group.
    os._exit(0)


if __name__ == "__main__":
    main()
