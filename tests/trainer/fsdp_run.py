"""The program of each of the two processes of `test_fsdp.py`; with torchrun:
`torchrun --nproc_per_node 2 -m tests.trainer.fsdp_run CASES DATASET STUDENT OUTPUT`, CASES `quick` or `slow`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaForCausalLM

from coldstill.common.errors import ColdstillError
from coldstill.trainer.config import LoraConfig, StudentConfig, TrainConfig
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.loss_kernels import fused_head
from coldstill.trainer.student.lora import with_adapters
from coldstill.trainer.train import train as train_whole_run
from tests import making
from tests.trainer.ddp_run import sick_row, train
from tests.trainer.training import build, weights_of

PLAIN = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3}
ADAM = {**PLAIN, "optim": "adamw_torch", "learning_rate": 1e-3}
PACKED = {**PLAIN, "pack_length": 40, "gradient_checkpointing": True, "max_steps": 2}


def on_one(shape: dict[str, Any]) -> dict[str, Any]:
    """The settings of one process that takes the steps of two."""
    return {**shape, "gradient_accumulation_steps": 2 * shape["gradient_accumulation_steps"]}


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


def config_of(dataset: Path, student: Path, output: Path, **training: Any) -> TrainConfig:
    """A run of `coldstill train` with measurements and a best checkpoint."""
    return TrainConfig(
        dataset=str(dataset),
        output=str(output),
        student=StudentConfig(model=str(student)),
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


def gathers(dataset: Path, student: Path, output: Path) -> dict[str, int]:
    """Collectives of the forward and backward pass of one micro-batch, by the number of chunks of the loss."""
    trainer, _ = build(dataset, student, output, max_steps=1)
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
        "adam": train(dataset, student, output / "adam", **ADAM),
        "resumed": killed_and_resumed(output / "resumed", dataset, student, **ADAM),
        "sick row": sick_row(dataset, student, output / "sick"),
        "sick weight": error_of(lambda: build(dataset, spoiled(student), output / "bad", max_steps=1)[0].train()),
    }


def slow(dataset: Path, student: Path, output: Path) -> dict[str, Any]:
    """What the slow tests read."""
    tied = making.tiny_llama(output / f"tied-{os.environ['RANK']}", tie_word_embeddings=True)
    entropy = {"loss": "cross_entropy", **PLAIN}
    found: dict[str, Any] = {
        "taid, tied": train(dataset, tied, output / "taid-tied", **PLAIN),
        "cross_entropy": train(dataset, student, output / "entropy", **entropy),
        "cross_entropy, tied": train(dataset, tied, output / "entropy-tied", **entropy),
        "packed": train(dataset, student, output / "packed", **PACKED),
        "logits": train(dataset, student, output / "logits", fused_head=False, **PLAIN),
        "lora": train(dataset, adapted(student), output / "lora", **ADAM),
        "frozen": train(dataset, frozen(student), output / "frozen", **PLAIN),
        "gathers": gathers(dataset, student, output / "gathers"),
    }
    train(dataset, adapted(student), output / "lora-killed", kill=2, **ADAM)
    found["lora, resumed"] = train(dataset, adapted(student), output / "lora-killed", **ADAM)
    train(dataset, tied, output / "tied-killed", kill=2, **ADAM)
    found["tied, resumed"] = train(dataset, tied, output / "tied-killed", **ADAM)
    with unsharded():
        found["ddp"] = train(dataset, student, output / "ddp", **ADAM)
        train(dataset, student, output / "ddp-fsdp", kill=2, **ADAM)
        train(dataset, adapted(student), output / "lora-ddp-fsdp", kill=2, **ADAM)
    found["ddp, resumed"] = train(dataset, student, output / "ddp-fsdp", **ADAM)
    found["lora, ddp, resumed"] = train(dataset, adapted(student), output / "lora-ddp-fsdp", **ADAM)
    train(dataset, student, output / "fsdp-ddp", kill=2, **ADAM)
    with unsharded():
        found["fsdp, resumed by ddp"] = train(dataset, student, output / "fsdp-ddp", **ADAM)
    for name, changes in (("whole run", {}), ("whole run in bfloat16", {"dtype": "bfloat16"})):
        config = config_of(dataset, student, output / name)
        config = config.model_copy(update={"student": config.student.model_copy(update=changes)})
        found[name] = train_whole_run(config).model_dump()
    best = build(
        dataset,
        student,
        output / "best",
        eval_dataset=load_logit_dataset(dataset),
        **{**ADAM, "learning_rate": 0.05, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"},
        save_steps=1,
        metric_for_best_model="eval_loss",
        load_best_model_at_end=True,
    )[0]
    best.train()
    found["best"] = {"folder": best.state.best_model_checkpoint, "weights": weights_of(best.model)}
    return found


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
    # What `accelerate launch --config_file examples/fsdp.yaml` sets.
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }
    shard_on_the_cpu()
    cases = {"quick": quick, "slow": slow}[sys.argv[1]]
    dataset, student, output = map(Path, sys.argv[2:5])
    found = cases(dataset, student, output)
    torch.save(found, output / f"rank-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
