"""Two processes that FSDP2 shards train like one, resume, and write what one writes."""

from __future__ import annotations

import dataclasses
import os
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainingArguments

from coldstill.trainer.checkpoint_files import damage
from coldstill.trainer.errors import CheckpointMismatch, UnsupportedArgument
from coldstill.trainer.evaluation.evaluate import _in_step
from coldstill.trainer.finished_student import TrainedLogits
from coldstill.trainer.sharding import (
    validate_activation_checkpointing,
    validate_sharded_optimizer,
    validate_sharded_student,
    validate_sharding,
)
from coldstill.trainer.student.forward import distill_in_forward
from coldstill.trainer.student.wrapper import Wrapping
from coldstill.trainer.train import train as train_whole_run
from tests import making
from tests.trainer.ddp_run import train
from tests.trainer.fsdp_run import CASES, EXAMPLE, PLAIN, Case, config_of, launched
from tests.trainer.test_ddp import run_ranks
from tests.trainer.training import arguments, build

EXACT = {"rtol": 0, "atol": 0}
EQUAL = {"rtol": 0, "atol": 1e-6}
"""float32. Sums over devices are of another order."""


@pytest.fixture(scope="module")
def sealed(_sealed: Path) -> Path:
    """A dataset that no test changes."""
    return _sealed


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def ranks(sealed: Path, tiny_student: Path, output: Path) -> list[dict]:
    return run_ranks(sealed, tiny_student, output, "quick", program="fsdp_run")


@pytest.fixture(scope="module")
def slow_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp-slow")


@pytest.fixture(scope="module")
def slow_ranks(sealed: Path, tiny_student: Path, slow_output: Path) -> list[dict]:
    return run_ranks(sealed, tiny_student, slow_output, "slow", program="fsdp_run")


def assert_like_one(found: dict[str, Any], one: dict[str, Any]) -> None:
    assert found["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, **EQUAL)
    for mine, wanted in zip(found["gradients"], one["gradients"], strict=True):
        torch.testing.assert_close(mine, wanted, **EQUAL)
    assert (found["targets"], found["epoch"]) == (one["targets"], one["epoch"])
    for mine, wanted in zip(found["log"], one["log"], strict=True):
        for key in {"loss", "grad_norm", "bucket_kl", "taid_t", "taid_momentum"} & wanted.keys():
            assert mine[key] == pytest.approx(wanted[key], rel=1e-6, abs=1e-6), key
    for name, value in one["evaluation"].items():
        assert found["evaluation"][name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


def test_two_shards_take_the_steps_of_one_process_that_accumulates(ranks, sealed, tiny_student, tmp_path):
    one = train(sealed, tiny_student, tmp_path, **Case(PLAIN).on_one)
    assert max(line["grad_norm"] for line in one["log"]) > 0.0  # clipped below
    for found in ranks:
        assert_like_one(found["taid"], one)
        assert found["taid"]["evaluation"]["eval_targets"] == one["evaluation"]["eval_targets"]
    pairs = zip(*(found["taid"]["rows"] for found in ranks), strict=True)
    assert [rows for pair in pairs for rows in pair] == one["rows"]


def test_killed_on_two_shards_it_ends_with_the_weights_of_an_uninterrupted_run(ranks):
    for found in ranks:
        assert found["resumed"]["rows"] == found["taid"]["rows"][4:]
        assert found["resumed"]["schedule"] == found["taid"]["schedule"]
        for name, weight in found["taid"]["weights"].items():
            torch.testing.assert_close(found["resumed"]["weights"][name], weight, **EXACT)


def test_the_head_is_gathered_once_however_many_chunks_the_loss_has(ranks):
    """Groups: embeddings, two layers, and the last norm with the head, which alone is not gathered again backward."""
    for found in ranks:
        assert found["gathers"]["many chunks"] == found["gathers"]["one chunk"]
        assert found["gathers"]["one chunk"] == {"c10d._allgather_base_": 7, "c10d._reduce_scatter_base_": 4}


def test_a_checkpoint_has_the_files_of_an_unsharded_run_and_loads_as_a_plain_model(ranks, output, sealed, tiny_student):
    checkpoint = output / "taid/checkpoint-2"
    assert damage(checkpoint) == ""
    one, _ = build(sealed, tiny_student, output / "one", max_steps=2, save_strategy="steps", save_steps=2)
    one.train()
    names = {path.name for path in (output / "one/checkpoint-2").iterdir()} - {"rng_state.pth"}
    assert {path.name for path in checkpoint.iterdir()} == names | {"rng_state_0.pth", "rng_state_1.pth"}
    trained = TrainedLogits.read(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model) is LlamaForCausalLM
    torch.testing.assert_close(TrainedLogits.of(model, trained.tokens).logits, trained.logits, **EQUAL)


def test_a_checkpoint_of_two_shards_is_refused_on_one_process_by_name(ranks, output, sealed, tiny_student, tmp_path):
    trainer, _ = build(sealed, tiny_student, tmp_path, **{**PLAIN, "per_device_train_batch_size": 2})
    with pytest.raises(CheckpointMismatch, match="devices"):
        trainer.train(resume_from_checkpoint=output / "taid/checkpoint-2")


@pytest.mark.parametrize("what", ["sick row", "sick weight"])
def test_a_value_that_is_not_finite_on_one_shard_stops_both_with_the_same_error(ranks, what):
    assert ranks[0][what] == ranks[1][what]
    assert ("row-" if what == "sick row" else "model.layers.1.mlp.up_proj.weight") in ranks[0][what]
    assert what == "sick row" or "1 of 2,048" in ranks[0][what]


@pytest.mark.parametrize("own", [[3, 0, 2], [0], []])
def test_a_shard_without_a_batch_or_targets_runs_a_token_for_each_pass_of_the_others(own):
    """The other process, which the sum over both counts in, has four batches."""
    passes: list[str] = []
    others = iter([1.0, 1.0, 1.0, 1.0, 0.0])
    student = SimpleNamespace(device="cpu", take_part=lambda: passes.append("token"))
    batches = [{"targets": SimpleNamespace(count=count)} for count in own]
    for batch in _in_step(batches, student, lambda mine: mine + next(others)):
        passes.append(batch["targets"].count)
    assert passes == [*(count or "token" for count in own), *["token"] * (4 - len(own))]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_students_losses_and_memory_savers_on_two_shards_are_those_of_one_process(
    slow_ranks, sealed, tiny_student, tmp_path, name
):
    case = CASES[name]
    one = train(sealed, case.student(tiny_student), tmp_path, **case.on_one)
    for found in slow_ranks:
        assert_like_one(found[name], one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied, adam", "lora"])
def test_a_run_resumes_from_its_own_checkpoint_exactly_and_from_one_of_ddp_and_the_other_way_round(slow_ranks, name):
    for found in slow_ranks:
        for other, wanted, bound in (
            ("resumed", name, EXACT),
            ("from ddp", f"{name}, ddp", EQUAL),
            ("to ddp", f"{name}, ddp", EQUAL),
        ):
            for weight, value in found[wanted]["weights"].items():
                torch.testing.assert_close(found[f"{name}, {other}"]["weights"][weight], value, **bound)


@pytest.mark.slow
def test_a_tied_head_is_saved_once_and_frozen_weights_under_adapters_never(slow_ranks, slow_output):
    assert "lm_head.weight" not in load_file(slow_output / "taid, tied/checkpoint-2/model.safetensors")
    adapters = load_file(slow_output / "lora/checkpoint-2/adapter_model.safetensors")
    assert adapters
    assert all("lora_" in name for name in adapters)


@pytest.mark.slow
def test_coldstill_train_writes_the_student_of_one_process(slow_ranks, slow_output, sealed, tiny_student, tmp_path):
    one = train_whole_run(config_of(sealed, tiny_student, tmp_path, gradient_accumulation_steps=2))
    wanted = load_file(tmp_path / "student/model.safetensors")
    for name, bound in (("run", EQUAL), ("run in bfloat16", {"rtol": 0, "atol": 1e-2})):
        assert slow_ranks[0][name]["student_step"] == one.student_step
        model = AutoModelForCausalLM.from_pretrained(slow_output / name / "student")
        assert model.dtype == torch.float32
        found = load_file(slow_output / name / "student/model.safetensors")
        assert found.keys() == wanted.keys()
        for weight, value in wanted.items():
            torch.testing.assert_close(found[weight], value, **bound)
    half = TrainedLogits.read(slow_output / "run in bfloat16/checkpoint-6")
    assert half.logits.dtype == torch.bfloat16


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_into_the_shards(slow_ranks):
    for found in slow_ranks:
        saved = load_file(Path(found["best"]["folder"], "model.safetensors"))
        assert Path(found["best"]["folder"]).name != "checkpoint-3"
        for name, weight in saved.items():
            torch.testing.assert_close(found["best"]["weights"][name], weight, **EXACT)


@pytest.mark.slow
def test_a_head_that_is_a_group_of_its_own_is_gathered_once_too(slow_ranks):
    for found in slow_ranks:
        assert found["gathers, head alone"]["many chunks"] == found["gathers, head alone"]["one chunk"]


def accelerator(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """What accelerate makes of the example's file with `changes`, in this one process."""
    for name in [name for name in os.environ if "FSDP" in name]:
        monkeypatch.delenv(name)
    for name, value in launched(**changes).items():
        monkeypatch.setenv(name, value)
    # These two make one of the settings true for all of the process, and so for the tests after this one.
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"])
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin()),
        parallelism_config=None,
        mixed_precision="no",
        gradient_state=SimpleNamespace(plugin_kwargs={}),
    )


def validate(accelerator: Any, args: TrainingArguments) -> None:
    validate_activation_checkpointing(args)
    validate_sharding(accelerator, args)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_configuration_of_the_example_is_accepted_and_casts_weights_alone(monkeypatch, tmp_path, dtype):
    found, args = accelerator(monkeypatch), arguments(tmp_path, bf16=dtype == "bfloat16")
    if args.bf16:
        found.mixed_precision = "bf16"
        found.state.fsdp_plugin.set_mixed_precision("bf16")
    validate(found, args)
    policy = found.state.fsdp_plugin.mixed_precision_policy
    if not args.bf16:
        assert policy is None
    else:
        casts = (policy.param_dtype, policy.reduce_dtype, policy.output_dtype, policy.cast_forward_inputs)
        assert casts == (torch.bfloat16, torch.float32, None, False)
    assert found.gradient_state.plugin_kwargs == {"sync_each_batch": True}


REFUSED = {
    "fsdp_version": ({"fsdp_version": 1, "fsdp_sync_module_states": False}, "set fsdp_version: 2"),
    "fsdp_state_dict_type": ({"fsdp_state_dict_type": "SHARDED_STATE_DICT"}, "FULL_STATE_DICT"),
    "fsdp_cpu_ram_efficient_loading": ({"fsdp_cpu_ram_efficient_loading": True}, "set it to False"),
    "fsdp_offload_params": ({"fsdp_offload_params": True}, "set it to False"),
    "fsdp_ignored_modules": ({"fsdp_ignored_modules": ".*norm"}, "remove fsdp_ignored_modules"),
    "fsdp_auto_wrap_policy": ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP"),
    "fsdp_activation_checkpointing": ({"fsdp_activation_checkpointing": True}, "student.gradient_checkpointing"),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_that_training_cannot_honor_is_refused_with_a_way_out(monkeypatch, tmp_path, setting):
    changes, fix = REFUSED[setting]
    found, args = accelerator(monkeypatch, **changes), arguments(tmp_path)
    with pytest.raises(UnsupportedArgument, match=setting) as error:
        validate(found, args)
    assert fix in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim": "adamw_torch", "torch_compile": True}, "torch_compile"),
        ({"bf16": True}, "mixed_precision"),
    ],
)
def test_an_argument_that_does_not_fit_fsdp_is_refused(monkeypatch, tmp_path, changes, words):
    with pytest.raises(UnsupportedArgument, match=words):
        validate_sharding(accelerator(monkeypatch), arguments(tmp_path, **changes))


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD", "Adagrad", "Adafactor", "Muon"])
def test_an_optimizer_that_reads_more_than_one_element_or_begins_before_sharding_is_refused(kind):
    optimizer = getattr(torch.optim, kind)([torch.nn.Parameter(torch.ones(2, 2))])
    with nullcontext() if kind in ("AdamW", "Adam", "SGD") else pytest.raises(UnsupportedArgument, match=kind):
        validate_sharded_optimizer(optimizer)


def test_the_page_shows_the_example() -> None:
    page = (EXAMPLE.parents[1] / "docs/several_gpus.md").read_text()
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert yaml.safe_load(shown) == yaml.safe_load(EXAMPLE.read_text())


def test_deepspeed_is_refused_with_fsdp_as_the_way_out(tmp_path):
    state = SimpleNamespace(deepspeed_plugin=object())
    with pytest.raises(UnsupportedArgument, match=r"examples/fsdp\.yaml"):
        validate_sharding(SimpleNamespace(state=state), arguments(tmp_path))


def test_students_that_cannot_be_sharded_are_refused_by_name(tiny_student):
    model = LlamaForCausalLM.from_pretrained(tiny_student)
    plain = distill_in_forward(model, token_count=making.VOCABULARY)
    validate_sharded_student(model, plain, images=None, mixed=True, is_aligned=False)
    prompted = dataclasses.replace(plain, wrapping=Wrapping(added=2, transparent=False))
    for given, distilling, images, words in (
        (model, plain, object(), "images"),
        (model, plain, None, "tokenizer"),
        (model, prompted, None, "prompt tuning"),
        (model.bfloat16(), plain, None, "student.weights"),
    ):
        with pytest.raises(UnsupportedArgument, match=words):
            validate_sharded_student(given, distilling, images=images, mixed=True, is_aligned=words == "tokenizer")
