"""The finished student is the trained model, loaded again; its report and its model card for long and short logs."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, TrainerCallback

import coldstill.trainer.finished_student as finished
import coldstill.trainer.student.lora as lora
from coldstill.storage_schema.dataset import open_dataset
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.errors import AdapterMisfit, StudentDiffers
from coldstill.trainer.evaluation.measured_model import load_measured
from coldstill.trainer.finished_student import LOGITS_NAME, MOST_ROWS, TrainedLogits, first_row, model_card, report_text
from coldstill.trainer.losses import read_loss
from coldstill.trainer.student.forward import innermost
from coldstill.trainer.train import train
from tests import making
from tests.trainer.student.families import FAMILIES, tiny
from tests.trainer.test_train import make_config
from tests.trainer.training import build

QUICK = {"max_steps": 3, "learning_rate": 0.05, "save_steps": 100}


class Live(TrainerCallback):
    """Keeps the logits of the model in training after its last step."""

    tokens = torch.arange(12)

    def on_train_end(self, args, state, control, model=None, **_) -> None:
        self.logits = logits_of(innermost(model))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return type(innermost(model)).forward(innermost(model).eval(), input_ids=Live.tokens[None]).logits[0].float()


def tied(folder: Path, **changes: Any) -> Path:
    return making.tiny_llama(folder, tie_word_embeddings=True, **changes)


def merging(*targets: str, **changes: Any) -> dict[str, Any]:
    return {"lora": {"r": 4, "alpha": 8, "merge": True, "target_modules": list(targets)}, **changes}


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_merge_unties_what_it_changes(tiny_dataset, tmp_path, target, weights):
    student = merging(target, weights=weights)
    config = make_config(tiny_dataset, tied(tmp_path / "tied"), tmp_path / "run", student=student, training=QUICK)
    live = Live()
    train(config, callbacks=[live])
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/student")
    assert reloaded.config.tie_word_embeddings is False
    before = logits_of(LlamaForCausalLM.from_pretrained(tmp_path / "tied"))
    learned = (live.logits - before).abs().max()
    assert learned > 0.1
    assert (logits_of(reloaded) - live.logits).abs().max() < learned / (1e4 if weights == "float32" else 5)


def test_the_adapters_of_a_merged_student_have_their_tokenizer(tiny_dataset, tiny_student, tmp_path):
    live = Live()
    student = merging("q_proj")
    train(make_config(tiny_dataset, tiny_student, tmp_path / "run", student=student, training=QUICK), callbacks=[live])
    measured = load_measured(str(tmp_path / "run/adapter"), open_dataset(tiny_dataset), role="the student")
    assert torch.equal(logits_of(measured), live.logits)


def damaged(checkpoint: Path, folder: Path) -> None:
    """A copy in which one row of the head is lost."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][5] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def unmerged(base: str, adapter: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def merged_with_another_scale(base: str, adapter: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    model = lora.merged(base, adapter, dtype=dtype)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("earlier", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("faults", "student"),
    [
        ({"_copy": damaged}, {}),
        ({"merged": unmerged}, merging("q_proj", "v_proj")),
        ({"merged": merged_with_another_scale}, merging("q_proj", "v_proj")),
        ({"_untie": lambda model: None}, merging("lm_head")),
        ({"_untie": lambda model: None}, merging("embed_tokens")),
    ],
)
def test_a_student_that_is_not_the_trained_model_is_a_named_error_and_its_checkpoint_stays(
    tiny_dataset, tmp_path, monkeypatch, faults, student, earlier
):
    """`earlier`: the checkpoint is of a release that kept no logits; a copy is then compared with its checkpoint."""
    folder = making.tiny_llama(tmp_path / "base", **({"tie_word_embeddings": True} if "_untie" in faults else {}))
    config = make_config(tiny_dataset, folder, tmp_path / "run", student=student, training=QUICK)
    with monkeypatch.context() as patch:
        for name, fault in faults.items():
            patch.setattr(lora if name == "_untie" else finished, name, fault)
        if earlier:
            patch.setattr(TrainedLogits, "write", lambda *_: None)
        with pytest.raises(StudentDiffers, match="logits off by") as error:
            train(config)
    assert "checkpoint-3" in error.value.fix
    assert not (tmp_path / "run/student").exists()
    assert not (tmp_path / "run/train_summary.json").exists()
    assert (tmp_path / "run/checkpoint-3").is_dir()
    assert train(config).steps == 3
    assert (tmp_path / "run/student/config.json").exists()


def test_the_student_of_the_best_checkpoint_is_held_against_the_model_of_that_step(
    tiny_dataset, tiny_student, tmp_path
):
    # A metric that never improves: the first checkpoint stays the best.
    training = {**QUICK, "max_steps": 4, "eval_steps": 2, "best_metric": "eval_teacher_cross_entropy"}
    config = make_config(
        tiny_dataset, tiny_student, tmp_path / "run", training=training, eval_dataset=str(tiny_dataset)
    )
    summary = train(config)
    assert (summary.student_step, summary.steps) == (2, 4)
    best, last = (
        TrainedLogits.read(tmp_path / f"run/checkpoint-{step}") for step in (summary.student_step, summary.steps)
    )
    found = TrainedLogits.of(AutoModelForCausalLM.from_pretrained(tmp_path / "run/student"), best.tokens)
    assert torch.equal(found.logits, best.logits)
    again = TrainedLogits.of(AutoModelForCausalLM.from_pretrained(tmp_path / "run/student"), last.tokens)
    assert not torch.allclose(again.logits, last.logits)
    assert not (tmp_path / "run/student" / LOGITS_NAME).exists()


def test_autocast_of_the_training_is_no_difference(tiny_dataset, tiny_student, tmp_path):
    student = {"dtype": "bfloat16"}
    train(make_config(tiny_dataset, tiny_student, tmp_path / "run", student=student, training=QUICK))
    kept = TrainedLogits.read(tmp_path / "run/checkpoint-3")
    found = TrainedLogits.of(AutoModelForCausalLM.from_pretrained(tmp_path / "run/student"), kept.tokens)
    assert torch.equal(found.logits, kept.logits)


def test_only_one_model_is_in_memory_while_the_student_is_compared(tiny_dataset, tiny_student, tmp_path, monkeypatch):
    inner, alive = finished._reloaded, []

    def watched(*args: Any) -> Any:
        gc.collect()
        alive.append(sum(isinstance(one, LlamaForCausalLM) for one in gc.get_objects()) - before)
        return inner(*args)

    gc.collect()
    before = sum(isinstance(one, LlamaForCausalLM) for one in gc.get_objects())
    monkeypatch.setattr(finished, "_reloaded", watched)
    student = merging("q_proj")
    train(make_config(tiny_dataset, tiny_student, tmp_path / "run", student=student, training=QUICK))
    assert alive == [0]


def test_the_kept_row_is_real_tokens_without_padding():
    batch = {"input_ids": torch.arange(200).reshape(2, 100), "attention_mask": torch.ones(2, 100, dtype=torch.long)}
    batch["attention_mask"][0, 7:] = 0
    assert first_row(batch).tolist() == list(range(7))
    del batch["attention_mask"]
    assert first_row(batch).tolist() == list(range(64))


PUBLIC = {
    "lora": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    "dora": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", use_dora=True, init_lora_weights=False),
    "rslora": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_rslora=True, init_lora_weights=False),
    "ia3": IA3Config(task_type="CAUSAL_LM"),
    "adalora": AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10),
    "whole head": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "parameters": LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"], lora_dropout=0.0
    ),
    "some tokens": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[3, 4, 5]),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_adapters_of_peft_are_measured_as_they_were_trained(tiny_dataset, tmp_path, name):
    """The loader of transformers gives DoRA fresh magnitudes, and refuses prompt learning."""
    folder = making.tiny_llama(tmp_path / "base", num_attention_heads=2, num_key_value_heads=2)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder), PUBLIC[name])
    trainer, _ = build(tiny_dataset, model, tmp_path / "run", max_steps=2, learning_rate=0.05, save_strategy="steps")
    trainer.train()
    live = TrainedLogits.read(tmp_path / "run/checkpoint-2")
    saved = tmp_path / "saved"
    trainer.save_model(str(saved))
    assert not (saved / LOGITS_NAME).exists()
    making.tiny_tokenizer(saved)
    measured = load_measured(str(saved), open_dataset(tiny_dataset), role="the student")
    assert torch.equal(TrainedLogits.of(measured, live.tokens).logits, live.logits)
    if "prompt" in name or "prefix" in name:
        with pytest.raises(AdapterMisfit, match="frozen"):
            build(tiny_dataset, measured, tmp_path / "again")


@pytest.mark.parametrize("name", ["lora", "whole head", "prompt tuning"])
def test_a_weight_that_is_trained_and_not_saved_is_a_named_error(tiny_dataset, tiny_student, tmp_path, name):
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_student), PUBLIC[name])
    innermost(model).model.norm.weight.requires_grad_(True)
    with pytest.raises(AdapterMisfit, match=r"norm\.weight is trained"):
        build(tiny_dataset, model, tmp_path)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gemma2",
        *(pytest.param(it, marks=pytest.mark.slow) for it in FAMILIES if it not in ("llama", "gemma2")),
    ],
)
def test_rounding_by_a_merge_is_no_difference_and_a_lost_adapter_is(tmp_path, family, weights):
    tiny(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=weights)
    head = [*("c_attn", "query_key_value", "qkv_proj", "q_proj", "o_proj"), "lm_head"]
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=head, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    live = TrainedLogits.of(adapted, torch.randint(0, making.VOCABULARY, (40,)))
    lora.merged(str(tmp_path / "base"), tmp_path / "adapter", dtype=weights).save_pretrained(tmp_path / "student")
    for folder, equal in (("student", True), ("base", False)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=weights)
        found = TrainedLogits.of(model, live.tokens)
        off = found.logits - live.logits
        rounding = finished._rounding(model, found)
        margin = finished.ROUNDING_MARGIN.get(weights, 2.0)
        assert (finished._mean_size(off) <= margin * finished._mean_size(rounding)) == equal


def test_the_report_shows_the_curve_of_t_and_samples_a_long_log():
    log = [{"step": n, "loss": 1.0, "taid_t": n / 999, "taid_momentum": 0.0, "bucket_kl": 2.0} for n in range(1000)]
    text = report_text(log)
    assert "t from 0.000 to 1.000" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == MOST_ROWS + 1
    assert lines[1].startswith("| 0 ")
    assert lines[-1].startswith("| 999 ")


def test_the_report_of_a_loss_without_t_has_none_and_shows_measurements():
    text = report_text([{"step": 1, "loss": 1.0}, {"step": 1, "eval_loss": 0.5, "eval_accuracy": 0.25}])
    assert "taid_t" not in text
    assert "| 1 | 0.5 | 0.25 |" in text


def test_an_empty_log_has_a_report():
    assert report_text([]).startswith("# ")


def test_the_hub_can_read_the_card_and_it_hides_local_folders(tiny_student: Path):
    text = model_card(
        student=str(tiny_student),
        headers=[making.tiny_header(tiny_student)],
        dataset_ids=["a" * 64],
        loss=read_loss("taid"),
        record={"targets": 1234567, "schedule": {"t": 0.9}},
        steps=12,
        adapters=False,
        recipe={"training": {"epochs": 2}},
    )
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert "taid" in card.data.tags
    for fact in ("a" * 64, "1,234,567", "0.9000", "CC0-1.0", "epochs: 2"):
        assert fact in text
    assert str(tiny_student) not in text


def test_the_card_of_a_hub_student_names_it_for_the_hub():
    text = model_card(
        student="Qwen/Qwen2.5-0.5B",
        headers=[],
        dataset_ids=[],
        loss=read_loss("cross_entropy"),
        record={"targets": 1, "schedule": None},
        steps=1,
        adapters=True,
    )
    data = ModelCard(text).data
    assert (data.base_model, data.library_name) == ("Qwen/Qwen2.5-0.5B", "peft")
    assert "final t" not in text


def test_a_teacher_of_a_strangers_dataset_adds_no_markup_to_the_card(tiny_student: Path) -> None:
    hostile = "x\r\n# Heading\n<img src=x> [a](b) | \x1b[31m\u202e" + "long" * 500
    header = making.tiny_header(tiny_student)
    teacher = header.teacher.model_copy(update={"name": hostile, "revision": hostile})
    about = header.about.model_copy(update={"license": hostile})
    header = header.model_copy(update={"teacher": teacher, "about": about})
    record = {"targets": 1, "schedule": None}
    loss, ids = read_loss("cross_entropy"), ["a"]
    text = model_card(student="s", headers=[header], dataset_ids=ids, loss=loss, record=record, steps=1, adapters=False)
    facts = text.split("---\n")[2]
    assert not {"<", "[", "]", "\r", "\x1b", "\u202e"} & set(facts)
    assert facts.count("\n# ") == 1
    assert len(facts) < 3_000


def test_a_published_recipe_names_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shapes" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for shape in (str(tmp_path / "shapes" / "small"), "/gone/small", "~/small", "shapes/small"):
        for settings in ({"from_scratch": shape}, {"model": shape}):
            config = {"dataset": str(tmp_path), "output": "/out", "student": settings, "data": {"cache_dir": "/cache"}}
            recipe = finished._recipe(TrainConfig.model_validate(config))
            assert recipe == {"student": dict.fromkeys(settings, "small")}
    lora = {"target_modules": ["x" * 5000, "\0"]}
    student = {"model": "organization/name", "lora": lora}
    kept = finished._recipe(TrainConfig.model_validate({"dataset": "d", "output": "o", "student": student}))
    assert kept == {"student": student}
