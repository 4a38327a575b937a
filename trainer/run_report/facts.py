"""What the page of a run says beside its log: settings, datasets, teachers and student."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from coldstill.common.models import flat
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.data.logit_dataset import LogitDataset
from coldstill.trainer.losses import read_loss
from coldstill.trainer.losses.base import Loss, with_tail

from .record import without_password

_PLACES = frozenset({"output_dir", "logging_dir", "run_name"})
"""Arguments that are not the training's, but say where it writes."""


@dataclass(frozen=True)
class RunFacts:
    """`settings`: `section.key` to value; `changed`: those that differ from their default; `sections`: facts as text,
    by title and name."""

    settings: dict[str, Any] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    sections: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of_config(cls, config: TrainConfig, dataset: LogitDataset) -> RunFacts:
        """Those of a run of `coldstill train`."""
        stated = flat(config.model_dump(mode="json", exclude_defaults=True))
        settings = without_password(flat(config.model_dump(mode="json")))
        return cls(
            {name: value for name, value in settings.items() if name != "output"},
            tuple(name for name in stated if name != "output"),
            _sections(dataset, student=config.student.name, loss=read_loss(config.loss)),
        )

    @classmethod
    def of_arguments(
        cls, args: TrainingArguments, loss: Loss, dataset: LogitDataset, *, student: str, **settings: Any
    ) -> RunFacts:
        """Those of a `DistillTrainer`. `settings`: its own, beside `args`, None where they are not set."""
        own = {**settings, **{f"loss.{name}": value for name, value in loss.model_dump(mode="json").items()}}
        plain = _plain(TrainingArguments(args.output_dir, use_cpu=args.use_cpu))
        given = _plain(args)
        changed = [name for name, value in own.items() if value is not None]
        changed += [name for name, value in given.items() if value != plain.get(name)]
        return cls(without_password({**own, **given}), tuple(changed), _sections(dataset, student=student, loss=loss))


def _plain(args: TrainingArguments) -> dict[str, Any]:
    """Arguments as JSON has them, without tokens, which `to_dict` hides, and without the places of files."""
    found: dict[str, Any] = json.loads(json.dumps(flat(args.to_dict()), default=str))
    return {name: value for name, value in found.items() if name not in _PLACES}


def _sections(dataset: LogitDataset, *, student: str, loss: Loss) -> dict[str, dict[str, str]]:
    """Facts of each dataset with its teacher, and of the student, as text."""
    found: dict[str, dict[str, str]] = {}
    datasets = dataset.all_datasets
    for number, one in enumerate(datasets, start=1):
        header, manifest = one.header, one.manifest
        found["Dataset" if len(datasets) == 1 else f"Dataset {number}"] = {
            "path": without_password(one.store.url),
            "dataset id": one.dataset_id,
            "teacher": header.teacher.full_name + (f" @ {header.teacher.revision}" if header.teacher.revision else ""),
            **({"teacher saw": header.teacher_saw} if header.teacher_saw else {}),
            "rows": f"{manifest.rows:,}",
            "targets": f"{manifest.targets:,}",
            "kept": header.kept_in_words,
            "draws per position": f"{header.draws:,}",
            "license": header.about.license or "not stated",
        }
    found["Student"] = {"model": student, "loss": loss.name}
    if tails := loss.tails():
        # What was used, where the setting is `auto`.
        used = [getattr(with_tail(loss, draws=part.draws), "tail", tails[0]) for part in dataset.by_teacher]
        found["Student"]["tail"] = ", ".join(dict.fromkeys(used))
    return found
