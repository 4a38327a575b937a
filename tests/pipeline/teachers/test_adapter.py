"""Laws of `teacher.adapter`: the engines give what peft's own model gives, or refuse the adapter by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherOutputInvalid, TeacherUnusable
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.teachers.adapter import Adapter, adapter_of
from coldstill.pipeline.teachers.protocol import Teacher, TokenSequence, scored_of
from coldstill.pipeline.teachers.vllm import teacher as teacher_module
from coldstill.pipeline.teachers.vllm.engine import engine_arguments
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import HeaderMismatch
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.header_facts import NamedIds
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.rows import TeacherTargets
from coldstill.tools.card.card import write_card
from tests import making
from tests.pipeline.capturing import capture_config, do_units

TOP_K, CONTEXT = 12, 128
NAMED = [3, 77, 201]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WIDE = {
    "target_modules": LAYERS,
    "r": 33,
    "use_rslora": True,
    "rank_pattern": {"layers.1.mlp.up_proj": 5},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "o_proj": 40},
}
"""A rank above vLLM's default, ranks and scales that differ by layer, and a scale by the root of the rank."""


def _config(folder: Path, adapter: Path | None, engine: str = "transformers", **changes: Any) -> TeacherConfig:
    if engine == "vllm":
        changes["engine_args"] = {**making.SMALL_ENGINE, **changes.get("engine_args", {})}
    fields = {"model": str(folder), "engine": engine, "top_k": TOP_K, "min_prob": 0.0, "draws": 0}
    extra = {"adapter": str(adapter)} if adapter else {}
    return TeacherConfig.model_validate({**fields, "max_length": CONTEXT, "dtype": "float32", **extra, **changes})


def _load(config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None = None) -> Any:
    teacher = load_teacher(config, header, sampling)
    os.environ.pop("LD_PRELOAD", None)  # set by vLLM for its children; the other tests start children too
    return teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.chat_model(tmp_path_factory.mktemp("base"), seed=5, context=CONTEXT)


@pytest.fixture(scope="module")
def wide(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.lora_adapter(tmp_path_factory.mktemp("wide") / "adapter", folder, **WIDE)


@pytest.fixture(scope="module")
def header(folder: Path) -> DatasetHeader:
    changes = {"max_length": CONTEXT, "vocab_size": AutoConfig.from_pretrained(folder).vocab_size}
    return making.tiny_header(folder, top_k=TOP_K, draws=0).model_copy(update=changes)


def _with_named_ids(header: DatasetHeader) -> DatasetHeader:
    about = header.about.model_copy(update={"score_ids": NamedIds(column="ids", top_k=TOP_K, most=4)})
    changes = {"top_k": TOP_K + 4, "kept_ids": "top_k_and_named", "about": about}
    return header.model_copy(update=changes)


def _rows(*, named: bool = False, count: int = 6) -> list[TokenSequence]:
    """Random tokens; with `named`, one list of ids for a row, or one for each target."""
    generator = np.random.default_rng(3)
    rows = []
    for number, length in enumerate(generator.integers(5, CONTEXT, count).tolist()):
        spans = np.array([[length // 4, length - 1]], np.int32)
        positions = int(spans[0, 1] - spans[0, 0])
        each = np.array([[*NAMED, -1], [-1] * 4, [number, 9, -1, -1]], np.int32)[np.arange(positions) % 3]
        rows.append(
            TokenSequence(
                sample_id=f"row {number}",
                source_row=number,
                token_ids=generator.integers(0, 250, length).astype(np.int32),
                target_spans=spans,
                score_ids=(each if number % 2 else np.array([NAMED], np.int32)) if named else None,
            )
        )
    return rows


def _targets(teacher: Teacher, rows: list[TokenSequence]) -> list[TeacherTargets]:
    return [one.targets for one in scored_of(teacher.score(rows))]


def _by_peft(folder: Path, adapter: Path, rows: list[TokenSequence], count: int) -> list[np.ndarray]:
    """`float64 [N, V]` log-probs of peft's model at the rows' targets, by no code of ours."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
    found = []
    for row in rows:
        with torch.inference_mode():
            logits = model(torch.from_numpy(row.token_ids.astype(np.int64))[None]).logits[0, :, :count]
        found.append(torch.log_softmax(logits.double(), -1).numpy()[np.arange(*row.target_spans[0])])
    return found


def _assert_scores(targets: list[TeacherTargets], logprobs: list[np.ndarray], *, tolerance: float = 1e-5) -> None:
    for found, wanted in zip(targets, logprobs, strict=True):
        at_kept = np.take_along_axis(wanted, found.ids, 1)
        np.testing.assert_allclose(found.logprobs[found.kept], at_kept[found.kept], atol=tolerance)
        tail = np.log1p(-np.where(found.kept, np.exp(at_kept), 0).sum(1))
        np.testing.assert_allclose(found.log_tail, tail, atol=tolerance)


HARD = {
    "a head and an embedding": {"target_modules": [*LAYERS, "lm_head", "embed_tokens"]},
    "a whole head": {"modules_to_save": ["lm_head"]},
    "DoRA": {"use_dora": True},
    "biases": {"bias": "lora_only", "lora_bias": True},
}


@pytest.mark.parametrize("kind", ["wide", *HARD])
def test_transformers_gives_what_pefts_own_model_gives(
    folder: Path, header: DatasetHeader, tmp_path: Path, kind: str
) -> None:
    adapter = making.lora_adapter(tmp_path / "adapter", folder, **(WIDE if kind == "wide" else HARD[kind]))
    rows = _rows()
    reference = _by_peft(folder, adapter, rows, header.token_count)
    adapted = _targets(_load(_config(folder, adapter), header), rows)
    _assert_scores(adapted, reference)
    base = _targets(_load(_config(folder, None), header), rows)
    assert (
        max(np.abs(one.label_logprob - other.label_logprob).max() for one, other in zip(base, adapted, strict=True))
        > 0.01
    )


def test_a_float32_head_of_a_bfloat16_model_has_its_delta(folder: Path, header: DatasetHeader, tmp_path: Path) -> None:
    facts = header.teacher.model_copy(update={"dtype": "bfloat16"})
    half = header.model_copy(update={"teacher": facts})
    rows, scores = _rows(), []
    for number, settings in enumerate(({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]})):
        adapter = making.lora_adapter(tmp_path / str(number), folder, scale=2.0, **settings)
        scores.append(_by_peft(folder, adapter, rows, header.token_count))
        found = _targets(_load(_config(folder, adapter, dtype="bfloat16"), half), rows)
        _assert_scores(found, scores[-1], tolerance=0.1)
    assert np.abs(scores[0][0] - scores[1][0]).max() > 1, "the two heads are alike: the test proves little"


def test_vllm_gives_what_peft_gives_also_at_named_ids_and_a_dropped_delta_is_found(
    folder: Path, wide: Path, header: DatasetHeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = _with_named_ids(header)
    rows = _rows(named=True)
    reference = _by_peft(folder, wide, rows, header.token_count)
    tap = _load(_config(folder, wide, "vllm"), named)
    found = _targets(tap, rows)
    _assert_scores(found, reference)
    for targets, row in zip(found, rows, strict=True):
        assert row.score_ids is not None
        targets.check(token_count=header.token_count)
        for n, ids in enumerate(np.broadcast_to(row.score_ids, (targets.positions, row.score_ids.shape[1]))):
            assert {*ids.tolist()} - {-1} <= {*targets.ids[n, : targets.counts[n]].tolist()}
    by_transformers = _targets(_load(_config(folder, wide), named), rows)
    for one, other in zip(found, by_transformers, strict=True):
        np.testing.assert_array_equal(one.counts, other.counts)
        np.testing.assert_array_equal(np.sort(one.ids, 1), np.sort(other.ids, 1))
        np.testing.assert_allclose(np.sort(one.logprobs, 1), np.sort(other.logprobs, 1), atol=1e-5)
    facts = tap.environment
    assert facts["adapter_effect"] > 1e-3
    assert facts["adapter_kl"] <= facts["adapter_kl_limit"] < facts["adapter_effect"] / 100
    _drop_a_delta(tap)
    adapter = Adapter(_config(folder, wide, "vllm"))
    with pytest.raises(TeacherOutputInvalid, match=r"(?s)layers\.1\.mlp\.up_proj in vLLM.*norm 0"):
        tap._check_adapter(adapter)
    monkeypatch.setattr(teacher_module, "check_layers", lambda *_, **__: None)
    with pytest.raises(TeacherOutputInvalid, match=r"(?s)nats from transformers with peft.*merge_and_unload"):
        tap._check_adapter(adapter)


def _drop_a_delta(tap: Any) -> None:
    """As an engine does that leaves out a layer."""

    def drop(model: Any) -> None:
        model.model.layers[1].mlp.gate_up_proj.lora_b_stacked[1].zero_()

    tap._engine._llm.apply_model(drop)


@pytest.mark.slow
def test_answers_and_cached_prefixes_have_the_adapter_too(folder: Path, wide: Path, header: DatasetHeader) -> None:
    changed = header.model_copy(update={"mode": "generate", "order": "fast"})
    config = _config(folder, wide, "vllm", engine_args={"enable_prefix_caching": True})
    teacher = _load(config, changed, SamplingConfig(n=2, seed=4, max_tokens=30))
    nothing = np.empty((0, 2), np.int32)
    prompts = [
        TokenSequence(sample_id=row.sample_id, source_row=0, token_ids=row.token_ids[:40], target_spans=nothing)
        for row in _rows()
    ]
    for _ in range(2):  # the second time, the prompts are in the cache
        answers = scored_of(teacher.score(prompts))
        assert len(answers) == 12
        reference = _by_peft(folder, wide, [answer.sequence for answer in answers], header.token_count)
        _assert_scores([answer.targets for answer in answers], reference)


@pytest.mark.slow
def test_the_public_path_gives_what_peft_gives(folder: Path, wide: Path, header: DatasetHeader) -> None:
    derived = header.model_copy(update={"tail": "derived"})
    rows = _rows()
    found = _targets(_load(_config(folder, wide, "vllm", tap="public"), derived), rows)
    for one, wanted in zip(found, _by_peft(folder, wide, rows, header.vocab_size), strict=True):
        at_kept = np.take_along_axis(wanted, one.ids, 1)
        np.testing.assert_allclose(one.logprobs[one.kept], at_kept[one.kept], atol=1e-5)


@pytest.mark.parametrize("kind", [*HARD, "a rank above vLLM's", "an unknown setting"])
def test_what_vllm_would_drop_is_refused_with_the_way_out(folder: Path, tmp_path: Path, kind: str) -> None:
    settings = {**HARD, "a rank above vLLM's": {"r": 513}, "an unknown setting": {}}[kind]
    adapter = making.lora_adapter(tmp_path / "adapter", folder, **settings)
    if kind == "an unknown setting":
        _change(adapter, brings_its_own_norm=True)
    with pytest.raises(TeacherUnusable, match=r"(?s)which vLLM does not apply.*engine: transformers.*merge_and_unload"):
        adapter_of(_config(folder, adapter, "vllm"))
    if kind != "an unknown setting":
        assert adapter_of(_config(folder, adapter)) is not None


def _change(adapter: Path, **settings: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "peft_type PROMPT_TUNING"),
        ({"alora_invocation_tokens": [1]}, "in the middle of a row"),
    ],
)
def test_what_is_no_lora_of_all_tokens_is_refused(
    folder: Path, tmp_path: Path, settings: dict[str, object], why: str
) -> None:
    adapter = making.lora_adapter(tmp_path / "adapter", folder)
    _change(adapter, **settings)
    with pytest.raises(TeacherUnusable, match=why):
        adapter_of(_config(folder, adapter))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapters_files_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    adapter = making.lora_adapter(tmp_path / "adapter", folder)
    (adapter / name).unlink()
    with pytest.raises(TeacherUnusable, match=f"no {name}"):
        adapter_of(_config(folder, adapter))


def test_an_adapter_of_another_model_is_named(folder: Path, header: DatasetHeader, tmp_path: Path) -> None:
    deeper = making.tiny_llama(tmp_path / "deeper", num_hidden_layers=3)
    wider = making.tiny_llama(tmp_path / "wider", hidden_size=64, num_attention_heads=2)
    for base in (deeper, wider):
        adapter = making.lora_adapter(tmp_path / f"{base.name}-adapter", base)
        with pytest.raises(TeacherUnusable, match=rf"(?s)teacher\.adapter .*trained on, .*{base.name}"):
            _load(_config(folder, adapter), header)


def test_settings_and_weights_of_two_adapters_are_named(folder: Path, header: DatasetHeader, tmp_path: Path) -> None:
    adapter = making.lora_adapter(tmp_path / "adapter", folder)
    _change(adapter, r=3)
    with pytest.raises(TeacherUnusable, match=r"(?s)size mismatch for .*do not belong together"):
        _load(_config(folder, adapter), header)


@pytest.mark.parametrize("engine", ["endpoint", "tests.chaos.teacher:ChaosTeacher"])
def test_engines_that_load_the_model_themselves_refuse_an_adapter(folder: Path, wide: Path, engine: str) -> None:
    endpoint = {"endpoint": "http://host/v1"} if engine == "endpoint" else {}
    with pytest.raises(TeacherUnusable, match="merge the adapter into the model"):
        adapter_of(_config(folder, wide, engine, **endpoint))


def test_vllm_gets_room_for_the_rank_and_no_wrapper_of_the_head(
    folder: Path, wide: Path, header: DatasetHeader
) -> None:
    config = _config(folder, wide, "vllm")
    arguments = engine_arguments(config, header, Adapter(config))
    assert (arguments["enable_lora"], arguments["max_lora_rank"]) == (True, 64)
    assert arguments["lora_target_modules"] == sorted(LAYERS)


def test_another_tokenizer_beside_the_adapter_is_named(folder: Path, tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    base = Path(config.teacher.model)
    adapter = making.lora_adapter(tmp_path / "adapter", base)
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"adapter": str(adapter)})})
    tokenizer = (base / "tokenizer.json").read_bytes()
    (adapter / "tokenizer.json").write_bytes(tokenizer.replace(b"</s>", b"</S>"))
    with pytest.raises(TeacherUnusable, match=r"(?s)another tokenizer\.json.*trained on"):
        prepare(config)
    (adapter / "tokenizer.json").write_bytes(tokenizer)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(TeacherUnusable, match=r"(?s)another chat template.*set source\.chat_template"):
        prepare(config)
    source = config.source.model_copy(update={"chat_template": str(base / "chat_template.jinja")})
    prepare(config.model_copy(update={"source": source}))


def test_the_header_and_the_card_name_it_and_another_one_is_another_dataset(tmp_path: Path) -> None:
    plain = capture_config(tmp_path, rows=8)
    folder = Path(plain.teacher.model)
    making.lora_adapter(tmp_path / "adapter", folder)
    making.lora_adapter(tmp_path / "other", folder, seed=1)
    making.lora_adapter(tmp_path / "louder", folder)
    _change(tmp_path / "louder", lora_alpha=16)

    def with_adapter(name: str) -> Any:
        return plain.model_copy(update={"teacher": plain.teacher.model_copy(update={"adapter": str(tmp_path / name)})})

    prepared = prepare(with_adapter("adapter"))
    do_units(with_adapter("adapter"))
    seal(prepared.store)
    facts = open_dataset(plain.output).header.teacher.adapter
    assert facts is not None
    assert facts.name == "adapter"
    card = Path(write_card(plain.output)).read_text()
    assert f"| Adapter | adapter; fingerprint {facts.weights_fingerprint} |" in card
    for config in (plain, with_adapter("other"), with_adapter("louder")):
        with pytest.raises(HeaderMismatch, match=r"teacher\.adapter"):
            prepare(config)
