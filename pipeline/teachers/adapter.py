"""LoRA adapters of a teacher: their files, what each engine can apply of them, and peft's model of them.

Shape letters: `r` rank, `I` inputs and `O` outputs of a layer.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import safe_open
from torch import Tensor, nn

from coldstill.common.errors import first_line
from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.storage_schema.header_facts import ADAPTER_SETTINGS, ADAPTER_WEIGHTS, AdapterFacts, adapter_fingerprint
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, fingerprint_bytes

_TEMPLATE_NAME = "chat_template.jinja"

_NEUTRAL = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
        *("peft_version", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
        *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
    )
)
"""Settings of peft's LoRA under which its layers stay `x W + scale B A x`."""
_PLAIN_STARTS = frozenset(("gaussian", "eva", "orthogonal"))
"""Values of `init_lora_weights` that set no weight of the base model."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `max_lora_rank`."""
_HEADS = frozenset(("lm_head", "embed_tokens", "embed_out", "wte", "word_embeddings"))
_MODULE = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class Adapter:
    """The files of an adapter, in a local folder."""

    def __init__(self, config: TeacherConfig):
        """`config.adapter`: a folder or a name of the Hub. Raises `TeacherUnusable`, also for what `config.engine`
        would apply wrongly or not at all."""
        assert config.adapter is not None
        self._config, self._where = config, f"teacher.adapter {config.adapter}"
        self.folder = self._found(config.adapter, config.adapter_revision)
        self.name = self.folder.name if Path(config.adapter).is_dir() else config.adapter
        self.settings = self._read_settings()
        self._require_lora()
        if config.engine == "vllm":
            self._require_vllm()

    @property
    def facts(self) -> AdapterFacts:
        """What the header says of it. The digest is over the whole files: alpha changes values as weights do."""
        return AdapterFacts(name=self.name, weights_fingerprint=adapter_fingerprint(self.folder))

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        try:
            with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt") as file:
                return tuple(sorted(file.keys()))
        except Exception as error:  # its own error class is not exported
            raise self._unusable(f"{ADAPTER_WEIGHTS}: {first_line(error)}", "a whole file", "save it again") from error

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the layers that it changes by a product of two matrices, as in the base model."""
        found = (_MODULE.fullmatch(name) for name in self.tensors)
        return tuple(sorted({match["module"] for match in found if match}))

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The last parts of the layers' names, such as `q_proj`."""
        return tuple(sorted({name.rpartition(".")[2] for name in self.modules}))

    @property
    def vllm_rank(self) -> int:
        """vLLM's `max_lora_rank`: the smallest that holds the largest rank."""
        return next(rank for rank in VLLM_RANKS if rank >= self._largest_rank())

    def squared_norms(self) -> dict[str, float]:
        """`||scale B A||^2` by layer: what the adapter adds to its weights, in float64."""
        norms = {}
        with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt") as file:
            for module in self.modules:
                down, up = (file.get_tensor(f"base_model.model.{module}.lora_{side}.weight") for side in "AB")
                norms[module] = self._scale(module, down.shape[0]) ** 2 * squared_norm(down, up)
        return norms

    def check_tokenizer(self, files: Mapping[str, bytes], *, has_own_template: bool) -> None:
        """Raises `TeacherUnusable` for a tokenizer beside the adapter that differs from `files`, the base model's, or
        for another chat template, unless `source.chat_template` names one."""
        stored = self.folder / TOKENIZER_FILE
        if stored.exists():
            own, base = (
                fingerprint_bytes(data, where=where).fingerprint
                for data, where in (
                    (stored.read_bytes(), str(stored)),
                    (files[TOKENIZER_FILE], f"{self._config.model}: {TOKENIZER_FILE}"),
                )
            )
            if own != base:
                raise self._unusable(
                    f"another tokenizer.json than that of teacher.model {self._config.model}",
                    "the same ids",
                    f"name the model that it was trained on, {self._base}, or merge the adapter: {self._merge}",
                )
        template = self.folder / _TEMPLATE_NAME
        if has_own_template or not template.exists():
            return
        if template.read_bytes().strip() != files.get(_TEMPLATE_NAME, b"").strip():
            raise self._unusable(
                f"another chat template than that of teacher.model {self._config.model}",
                "a choice between the two",
                f"set source.chat_template: {template}, or to a file with the other template",
            )

    def on(self, model: Any) -> Any:
        """`model` with peft's layers in place of those that the adapter changes. Raises `TeacherUnusable`."""
        try:
            from peft import PeftModel, get_peft_model_state_dict
        except ImportError as error:
            raise TeacherUnusable(
                self._where, found="no package peft", wanted="peft, which applies it", fix='pip install "peft>=0.21"'
            ) from error
        try:
            adapted = PeftModel.from_pretrained(model, str(self.folder))
            loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        except (ValueError, RuntimeError, KeyError, TypeError, ImportError, OSError) as error:
            raise self._unusable(first_line(error), "an adapter of teacher.model", self._other_base) from error
        # peft only warns of tensors that fit no layer, and leaves out those of layers that it does not find.
        whole = {re.sub(r"\.default(?=\.|$)", "", name) for name in adapted.state_dict()}
        strange = [name for name in self.tensors if name not in loaded and name not in whole]
        missing = [name for name in loaded if name not in self.tensors]
        if strange or missing:
            problem = "tensors for which the model has no layer" if strange else "no tensors for layers of the model"
            raise self._unusable(
                f"{problem}, such as {(strange or missing)[0]}",
                "one tensor for each place",
                self._other_base,
            )
        return adapted.get_base_model()

    @property
    def _base(self) -> str:
        return str(self.settings.get("base_model_name_or_path") or "its base model")

    @property
    def _other_base(self) -> str:
        return (
            f"name the model that it was trained on, {self._base}; if teacher.model is that one, "
            f"{ADAPTER_SETTINGS} and {ADAPTER_WEIGHTS} do not belong together: load the adapter with peft and save it"
        )

    @property
    def _merge(self) -> str:
        return (
            f"AutoPeftModelForCausalLM.from_pretrained({self._config.adapter!r}).merge_and_unload()"
            ".save_pretrained(FOLDER), with the tokenizer beside it; then set teacher.model: FOLDER"
        )

    def _found(self, name: str, revision: str | None) -> Path:
        folder = Path(name)
        if not folder.is_dir():
            try:
                wanted = [ADAPTER_SETTINGS, ADAPTER_WEIGHTS, TOKENIZER_FILE, _TEMPLATE_NAME]
                folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
            except (OSError, ValueError) as error:
                raise TeacherUnusable(
                    self._where,
                    found=first_line(error),
                    wanted="a folder or Hub name of a LoRA adapter",
                    fix="check teacher.adapter and teacher.adapter_revision",
                ) from error
        for file in (ADAPTER_SETTINGS, ADAPTER_WEIGHTS):
            if not (folder / file).is_file():
                raise self._unusable(
                    f"no {file}", "an adapter as peft's `save_pretrained` writes it", "load it with peft and save it"
                )
        return folder

    def _read_settings(self) -> dict[str, Any]:
        with suppress(ValueError):
            settings = json.loads((self.folder / ADAPTER_SETTINGS).read_bytes())
            if isinstance(settings, dict):
                return settings
        raise self._unusable(f"{ADAPTER_SETTINGS}, which is not a JSON object", "settings of peft", "save it again")

    def _require_lora(self) -> None:
        if (kind := self.settings.get("peft_type")) != "LORA":
            raise self._unusable(f"peft_type {kind}", "LORA", f"merge it into its base model: {self._merge}")
        if self.settings.get("alora_invocation_tokens"):
            raise self._unusable(
                "alora_invocation_tokens, which switch it on in the middle of a row",
                "an adapter that applies to all tokens",
                "choose another adapter",
            )
        if not self.modules:
            raise self._unusable("no lora_A and lora_B tensors", "at least one layer", "check teacher.adapter")

    def _require_vllm(self) -> None:
        """vLLM applies products of two matrices to attention and MLP layers. All else it drops, gets wrong, or refuses
        in its own words."""
        problem = next(self._vllm_problems(), "")
        if problem:
            raise self._unusable(
                f"{problem}, which vLLM does not apply",
                "LoRA on attention and MLP layers",
                f"set teacher.engine: transformers, or merge it: {self._merge}",
            )

    def _vllm_problems(self) -> Any:
        start = self.settings.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
            yield f"init_lora_weights {start}"
        for name, value in sorted(self.settings.items()):
            if value and name not in _NEUTRAL and name != "init_lora_weights" and (name, value) != ("bias", "none"):
                yield f"{name} {json.dumps(value)[:80]}"
        for name in self.tensors:
            match = _MODULE.fullmatch(name)
            if match is None:
                yield f"the tensor {name}"
            elif ".experts" in match["module"] or match["module"].rpartition(".")[2] in _HEADS:
                yield f"a delta on {match['module']}"
        if self._largest_rank() > VLLM_RANKS[-1]:
            yield f"rank {self._largest_rank()}, above {VLLM_RANKS[-1]}"

    def _largest_rank(self) -> int:
        with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt") as file:
            sizes = [file.get_slice(name).get_shape()[0] for name in self.tensors if name.endswith("lora_A.weight")]
        return max([int(self.settings.get("r") or 1), *(self.settings.get("rank_pattern") or {}).values(), *sizes])

    def _scale(self, module: str, rank: int) -> float:
        patterns = self.settings.get("alpha_pattern") or {}
        alpha = next(
            (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)),
            self.settings.get("lora_alpha", 8),
        )
        return float(alpha) / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _unusable(self, found: str, wanted: str, fix: str) -> TeacherUnusable:
        return TeacherUnusable(self._where, found=found, wanted=wanted, fix=fix)


def squared_norm(down: Tensor, up: Tensor) -> float:
    """`||up down||^2` of `down [r, I]` and `up [O, r]`, without their product."""
    down, up = down.double(), up.double()
    return float(((up.T @ up) * (down @ down.T)).sum())


def merged_head(head: Any) -> Any:
    """A head with an adapter's layers as a plain float32 linear layer; any other head as it is."""
    with suppress(AttributeError):
        head = head.modules_to_save["default"]
    if not hasattr(head, "base_layer"):
        return head
    merged = copy.deepcopy(head).float()
    merged.merge(safe_merge=True)
    plain = merged.get_base_layer()
    assert isinstance(plain, nn.Linear)
    return plain.requires_grad_(False)


def require_engine(config: TeacherConfig) -> None:
    """Raise `TeacherUnusable` for an engine whose model the adapter cannot be applied to, or not provably."""
    if config.engine == "endpoint" or config.is_own_class:
        what = "its server" if config.engine == "endpoint" else "your class"
        raise TeacherUnusable(
            f"teacher.adapter {config.adapter}",
            found=f"teacher.engine {config.engine}: {what} loads the model, perhaps without the adapter",
            wanted="engine vllm or transformers",
            fix="merge the adapter into the model with peft's `merge_and_unload`, and name the merged folder",
        )
    if config.engine == "vllm" and config.runner != "v1":
        raise TeacherUnusable(
            f"teacher.adapter {config.adapter}",
            found=f"teacher.runner {config.runner}",
            wanted="runner v1",
            fix="set teacher.runner: v1",
        )


def adapter_of(config: TeacherConfig) -> Adapter:
    """The adapter that `config.adapter` names. Raises `TeacherUnusable`."""
    require_engine(config)
    return Adapter(config)
