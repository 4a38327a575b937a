"""Proves that vLLM applies an adapter: by the weights in its layers, and by peft's own model where that is small.

The self-check cannot see a delta that vLLM drops: its two paths share the layers. So at each engine start

- every layer's `||scale B A||^2` in the engine is that of the adapter's file. vLLM rounds the two matrices to the
  model's data type, which changes it by at most about four times the unit roundoff.
- for a base model of at most `SMALL_BYTES`, transformers with peft scores the same rows. The KL between the two
  engines with the adapter is at most `_MARGIN` times the one without it: a delta that is missing either shows, or is
  smaller than what the engines differ by anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.errors import TeacherOutputInvalid
from coldstill.pipeline.teachers.adapter import Adapter
from coldstill.pipeline.teachers.checkpoint import Score, random_sequences
from coldstill.pipeline.teachers.protocol import scored_of
from coldstill.storage_schema.header import DatasetHeader

from .self_check import largest_kl

SMALL_BYTES = 2 << 30
_LENGTHS = (2, 17, 96, 200)
_MARGIN = 16.0
"""Of a KL: four times the difference of a logit."""
_LEAST_KL = 1e-9
"""nats; float32 logits of two engines differ by more."""
_RELATIVE = {"float32": 1e-4}
_HALF = 0.05
"""Relative difference of squared norms, by the data type that vLLM rounds the matrices to."""


def check_layers(adapter: Adapter, answers: Sequence[Mapping[str, float]], *, dtype: str) -> None:
    """`answers`: of each worker process, the squared norm by layer, of the layers that it has. Processes that split a
    layer have parts of it, or copies of its key and value heads.

    Raises `TeacherOutputInvalid` for a layer that is missing or has another norm.
    """
    tolerance = _RELATIVE.get(dtype, _HALF)
    for module, wanted in adapter.squared_norms().items():
        found = sum(answer.get(module, 0.0) for answer in answers)
        is_whole = abs(found - wanted) <= tolerance * wanted
        if not (is_whole or (len(answers) > 1 and found > wanted)):
            raise TeacherOutputInvalid(
                f"teacher.adapter {adapter.name}: {module} in vLLM",
                found=f"an added weight of norm {found**0.5:.4g}",
                wanted=f"{wanted**0.5:.4g}, that of the adapter's file",
                fix="set teacher.engine: transformers, or merge the adapter into the model with peft's "
                "`merge_and_unload`",
            )


def check_by_peft(
    config: TeacherConfig, header: DatasetHeader, *, adapted: Score, base: Score, load: Callable[..., Any]
) -> dict[str, float]:
    """Compare the engine with `adapted` and without it, `base`, with transformers and peft: `load(config, header)` is
    a teacher of engine transformers. Returns facts for the commit records; none for a large, remote or quantized
    model.

    Raises `TeacherOutputInvalid`.
    """
    if header.teacher.quantization is not None:
        return {}  # transformers may have no kernels for it on a CPU
    files = list(Path(config.model).glob("*.safetensors")) if Path(config.model).is_dir() else []
    if not files or sum(file.stat().st_size for file in files) > SMALL_BYTES:
        return {}
    sequences = random_sequences(_LENGTHS, header, seed=0)
    trusted = {name: value for name, value in config.engine_args.items() if name == "trust_remote_code"}
    plain = config.model_copy(update={"engine": "transformers", "engine_args": trusted})
    reference = [one.targets for one in scored_of(load(plain, header).score(sequences))]
    unadapted = [
        one.targets for one in scored_of(load(plain.model_copy(update={"adapter": None}), header).score(sequences))
    ]
    ours, without = ([one.targets for one in scored_of(score(sequences))] for score in (adapted, base))
    found, own, effect = largest_kl(reference, ours), largest_kl(unadapted, without), largest_kl(reference, unadapted)
    if not found <= (limit := _MARGIN * own + _LEAST_KL):
        raise TeacherOutputInvalid(
            f"teacher.adapter {config.adapter} in vLLM, on {len(sequences)} rows of random tokens",
            found=f"a KL of {found:.2g} nats from transformers with peft; the adapter itself changes {effect:.2g}",
            wanted=f"at most {limit:.2g}; without the adapter it is {own:.2g}",
            fix="set teacher.engine: transformers, or merge the adapter into the model with peft's `merge_and_unload`",
        )
    return {"adapter_kl": found, "adapter_kl_limit": limit, "adapter_effect": effect}
