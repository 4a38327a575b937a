"""The student's card: what was learned from whom comes in, the text of its `README.md` goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from coldstill.storage_schema.header import DatasetHeader

from .loss_config import LossConfig

LOSS_TITLES = {
    "taid": "TAID (arXiv 2501.16937)",
    "forward_kl": "forward KL to the teacher",
    "reverse_kl": "reverse KL to the teacher",
    "js": "generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649)",
    "tvd": "total variation distance (f-DISTILL, arXiv 2307.15190)",
    "skew_forward_kl": "skew forward KL (DistiLLM, arXiv 2402.03898)",
    "skew_reverse_kl": "skew reverse KL (DistiLLM, arXiv 2402.03898)",
    "adaptive_kl": "adaptive KL (arXiv 2404.02657)",
    "dkd": "decoupled knowledge distillation (arXiv 2203.08679)",
    "ctkd": "curriculum temperature (arXiv 2211.16231)",
    "cross_entropy": "cross-entropy on the rows' own tokens; no teacher",
}


def model_card(
    *,
    student: str,
    headers: Sequence[DatasetHeader],
    dataset_ids: Sequence[str],
    loss: LossConfig,
    record: Mapping[str, Any],
    steps: int,
    adapters: bool,
    recipe: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with the Hub's metadata.

    `student`: what it was before; of a local folder only the name is shown. `record`: the state of `StepRecord` at the
    end. `recipe`: the settings of the run, for whoever repeats it.
    """
    base = Path(student).name if Path(student).is_dir() else student
    data = ModelCardData(
        library_name="peft" if adapters else "transformers",
        base_model=base if "/" in base else None,
        pipeline_tag="text-generation",
        tags=["coldstill", "knowledge-distillation", loss.name],
    )
    facts = {
        "student before": base or "random weights",
        "teacher": ", ".join(_teacher(header) for header in headers),
        "dataset id": ", ".join(dataset_ids),
        "licence of the dataset": ", ".join(header.licence or "not stated" for header in headers),
        "loss": f"{LOSS_TITLES[loss.name]}, tail: {loss.tail}",
        "cross-entropy share": f"{loss.cross_entropy_share:g}",
        "optimizer steps": f"{steps:,}",
        "targets seen": f"{record['targets']:,}",
    }
    if record["schedule"] is not None:
        facts["t at the end"] = f"{record['schedule']['t']:.4f}"
    lines = ["---", data.to_yaml(), "---", "", f"# {base or 'A student'}, taught from a cache of its teacher", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in facts.items())]
    if recipe is not None:
        settings = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).rstrip()
        lines += ["", "`coldstill train CONFIG.yaml` with:", "", "```yaml", settings, "```"]
    return "\n".join([*lines, ""])


def _teacher(header: DatasetHeader) -> str:
    revision = f" at {header.teacher.revision[:12]}" if header.teacher.revision else ""
    return f"{header.teacher.name}{revision}, top {header.top_k} log-probs, {header.draws} draws"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
