"""Students sharded over several devices by FSDP2 of torch, set up by accelerate's configuration.

Each device holds a part of each weight, of its gradient and of its optimizer state. accelerate groups the weights:
one group for each layer, and one for the last norm and the head, with the embeddings if they share the head's weight.
The head's group is gathered once in a forward pass and stays whole until its gradient is reduced, so the loss, which
computes the head in chunks, finds a plain tensor and gathers nothing itself, not even once per chunk as in
https://github.com/huggingface/trl/issues/6076.

Checkpoints hold whole tensors under the names and numbers of an unsharded run. So each loads as a plain model, and a
run that was started with DDP on as many devices resumes here, and the other way round.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers import TrainingArguments

from .errors import UnsupportedArgument
from .student.forward import Distilling, head_of, innermost

OPTIMIZERS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
"""They compute each element on its own, so they do the same on a part of a tensor, and make their state at the first
step, of the parts. Adafactor and the 8-bit optimizers keep sums over a whole tensor or over blocks of one."""


def is_sharded(model: Any) -> bool:
    """Whether FSDP2 has sharded `model`, which it does when the training begins."""
    return isinstance(model, FSDPModule)


def validate_activation_checkpointing(args: TrainingArguments) -> None:
    """Raise `UnsupportedArgument` if accelerate would recompute activations. Where transformers would too, it raises an
    error without a way out, so this is checked before."""
    name = "activation_checkpointing"
    environment = os.environ if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else {}
    found = (getattr(args, "fsdp_plugin_args", None) or {}).get(name) or environment.get(f"FSDP_{name.upper()}", "")
    if str(found).lower() in ("true", "1", "yes", "on"):
        raise UnsupportedArgument(
            f"accelerate's configuration: fsdp_{name}",
            found=True,
            wanted="false, because it draws other random numbers when it recomputes",
            fix="set it to false, and student.gradient_checkpointing to true",
        )


def validate_sharding(accelerator: Any, args: TrainingArguments) -> None:
    """Raise `UnsupportedArgument` for a way of sharding, or a setting of it, that training cannot honor.

    Sets how FSDP2 casts: weights to bfloat16 for the forward pass, gradients to float32 before they are summed, inputs
    and outputs not at all. accelerate would also cast the teacher's log-probs, the loss and the sums to bfloat16.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        raise UnsupportedArgument(
            "accelerate's configuration",
            found="DeepSpeed",
            wanted="FSDP version 2 for a student that is too large for one device, or no sharding",
            fix="start with accelerate launch --config_file examples/fsdp.yaml",
        )
    if plugin is None:
        return
    precision = "bf16" if args.bf16 else "no"
    state_dict = str(plugin.state_dict_type).rpartition(".")[2]
    policy = getattr(getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy), "__name__", "")
    offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    for setting, found, wanted, reason in (
        ("fsdp_version", plugin.fsdp_version, 2, "version 1 is deprecated in transformers"),
        ("fsdp_state_dict_type", state_dict, "FULL_STATE_DICT", "each checkpoint loads as a plain model"),
        ("fsdp_cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, False, "each process checks its student"),
        ("fsdp_offload_params", offload, False, "weights in the memory of the host are not tested"),
        ("fsdp_ignored_modules", plugin.ignored_modules, None, "their gradients would not be summed over devices"),
        ("parallelism_config", accelerator.parallelism_config, None, "each device has its own rows"),
        ("mixed_precision", accelerator.mixed_precision, precision, "this is what student.dtype says"),
        ("torch_compile", args.torch_compile, False, "it is not tested with FSDP"),
    ):
        if found != wanted:
            raise UnsupportedArgument(
                f"accelerate's configuration: {setting}",
                found=found,
                wanted=f"{wanted}, because {reason}",
                fix=f"set {setting}: {wanted}" if wanted else f"remove {setting}, or set it to {wanted}",
            )
    if policy == size_based_auto_wrap_policy.__name__:
        raise UnsupportedArgument(
            "accelerate's configuration: fsdp_auto_wrap_policy",
            found="SIZE_BASED_WRAP",
            wanted="TRANSFORMER_BASED_WRAP: by size, a head would be parted from embeddings that share its weight",
            fix="set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP",
        )
    # Gradients that wait for the last micro-batch of a step would wait whole, on each device.
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if args.bf16:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def validate_sharded_optimizer(optimizer: Any) -> None:
    """Raise `UnsupportedArgument` for an optimizer that would compute something else on parts of tensors."""
    if type(optimizer) not in OPTIMIZERS:
        raise UnsupportedArgument(
            "the optimizer of a sharded student",
            found=type(optimizer).__name__,
            wanted=f"one that computes each element on its own: {', '.join(cls.__name__ for cls in OPTIMIZERS)}",
            fix="set training.optimizer to adamw_torch_fused, or train without FSDP",
        )


def validate_sharded_student(model: Any, distilling: Distilling, *, images: Any, mixed: bool, is_aligned: bool) -> None:
    """Raise `UnsupportedArgument` for a student that FSDP2 cannot train here.

    `distilling`: how its loss is computed. `images`: how it reads images, if it does: a device whose rows have none
    would not take part in the vision tower of the others. `mixed`: it computes in bfloat16, whatever its weights are.
    `is_aligned`: its tokenizer is not the dataset's, which is not tested.
    """
    fix = "train with torchrun, without FSDP"
    if images is not None:
        found, wanted = "one that sees images", "one that reads text alone: all devices run the same layers"
    elif not distilling.wrapping.transparent:
        found, wanted = "a wrapper that changes its logits, such as prompt tuning", "all weights, or LoRA adapters"
    elif is_aligned:
        found, wanted = "one whose tokenizer is not the dataset's", "one with the dataset's tokenizer"
    elif mixed and any(weight.requires_grad and weight.element_size() < 4 for weight in model.parameters()):
        found, wanted = "trained weights of 16 bits and mixed precision", "float32, as accelerate would make them"
        fix = "set student.weights to float32, or student.dtype to float32"
    else:
        return
    raise UnsupportedArgument("the student, with FSDP", found=found, wanted=wanted, fix=fix)


def keep_head_whole(model: Any) -> None:
    """Keep the head of a sharded model gathered from its forward pass to its gradient.

    accelerate's own groups do so, but for a head whose class is listed in fsdp_transformer_layer_cls_to_wrap.
    """
    head = head_of(innermost(model))
    if isinstance(head, FSDPModule):
        head.set_reshard_after_forward(False, recurse=False)


def reshard(model: Any) -> None:
    """Drop the gathered weights of a sharded model, which would be old ones once the shards change."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def resharding(model: Any) -> Iterator[None]:
    """Forward passes without a backward pass: their gathered weights are dropped at the end."""
    try:
        yield
    finally:
        if is_sharded(model):
            reshard(model)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This device's part of a sharded tensor; a plain one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Any) -> Any:
    """A sharded tensor gathered, on all devices; anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any, *, keep: bool) -> Any:
    """`state` of nested dicts and lists with each sharded tensor whole and on the CPU. Call it on all devices.

    `keep`: whether this device needs the result; else the tensors are None. One tensor at a time is on a device.
    """

    def gather(tensor: DTensor) -> torch.Tensor | None:
        full = tensor.full_tensor()
        return full.cpu() if keep else None

    return tree_map_only(DTensor, gather, state)


def whole_weights(model: Any, *, keep: bool) -> dict[str, Any]:
    """The `state_dict` of a sharded model with whole tensors on the CPU, for `save_pretrained`. Call it on all devices.

    Names that share a weight share its tensor, as in a plain model. Frozen weights under adapters of peft are left out,
    because it saves none of them. `keep`: as of `gathered`.
    """
    reshard(model)
    weights = model.state_dict(keep_vars=True)
    if isinstance(model, PeftModel):
        weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
    tensors = {id(weight): gathered(weight.detach(), keep=keep) for weight in weights.values()}
    return {name: tensors[id(weight)] for name, weight in weights.items()}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load the `state_dict` of an unsharded optimizer, the same on all devices; each takes its part of each tensor."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, of_weight in state["state"].items():
        weight = weights[number]
        for name, value in of_weight.items():
            if isinstance(weight, DTensor) and isinstance(value, torch.Tensor) and value.shape == weight.shape:
                of_weight[name] = _shard(value, weight)
    optimizer.load_state_dict(state)


def load_sharded_weights(model: Any, folder: Path) -> None:
    """Load the weights of the checkpoint in `folder` into a sharded model; each device takes its part of each tensor.

    Raises `RuntimeError` if the weights have other names or shapes than those of the model.
    """
    reshard(model)
    if isinstance(model, PeftModel):
        like = next(weight for weight in model.parameters() if isinstance(weight, DTensor))
        adapters = {name: _shard(value, like) for name, value in load_peft_weights(str(folder), device="cpu").items()}
        set_peft_model_state_dict(model, adapters, adapter_name=model.active_adapter)
        return
    plain: Any = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    saved = plain.from_pretrained(folder, dtype="auto").state_dict()
    sharded = model.state_dict()
    model.load_state_dict(
        {
            name: _shard(value, sharded[name]) if isinstance(sharded.get(name), DTensor) else value
            for name, value in saved.items()
        }
    )


def _shard(value: torch.Tensor, like: DTensor) -> DTensor:
    """This device's part of `value`, which all devices hold, placed as `like` is."""
    return distribute_tensor(value, like.device_mesh, [Shard(0)], src_data_rank=None)


def end_process_group() -> None:
    """Let a process that trains no more leave its process group; nothing if it has none. Call it on all devices.

    Without it, NCCL warns, and gloo may abort the process: a thread of gloo that drops its last tensor after Python has
    begun to end waits for Python's lock, and is ended inside of a destructor ("terminate called without an active
    exception", https://github.com/pytorch/pytorch/issues/190489). Threads end with the group, and the group with its
    last reference. A model wrapped for DDP is part of a cycle, and holds one until the garbage is collected.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()
