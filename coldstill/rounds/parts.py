"""The parts of each round: their folders, their settings as an ordinary `coldstill` command, and whether they are done.

    round-NN/answers.yaml, answers/    `coldstill capture`: the student answers the prompts
    round-NN/scores.yaml,  scores/     `coldstill capture`: the teacher scores the answers
    round-NN/train.yaml,   train/      `coldstill train`: the student trains on the scores of all rounds so far

A part is done when its last file exists: the manifest of a dataset, the summary of a run. Nothing else is remembered,
so a part may also be run by hand.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from coldstill.common.config_file import ConfigInvalid
from coldstill.common.errors import type_and_line
from coldstill.common.files import STUDENT_FOLDER, SUMMARY_NAME, new_file
from coldstill.pipeline.config import TeacherConfig
from coldstill.storage_schema.manifest import MANIFEST_NAME

from .config import RoundsConfig

PartName = Literal["answers", "scores", "train"]
HEADINGS: dict[PartName, str] = {
    "answers": "the student answers the prompts",
    "scores": "the teacher scores the answers",
    "train": "the student trains on the scores of all rounds so far",
}
_ANSWERS_TOP_K = 1
"""The answers' distributions are the student's own. Nothing trains on them; their log-probs of the answers are kept."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of round number `round`, from 0. `settings`: those of `coldstill capture` or `coldstill train`."""

    round: int
    name: PartName
    folder: Path
    settings: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The part in messages, such as `round-00/answers`."""
        return f"{self.folder.parent.name}/{self.name}"

    @property
    def command(self) -> Literal["capture", "train"]:
        """The command of `coldstill` that runs the part."""
        return "train" if self.name == "train" else "capture"

    @property
    def config_path(self) -> Path:
        """The settings as a file, beside the folder."""
        return self.folder.with_name(f"{self.name}.yaml")

    @property
    def words(self) -> str:
        """The command to run the part by hand."""
        return f"coldstill {self.command} {shlex.quote(str(self.config_path))}"

    @property
    def is_done(self) -> bool:
        """Whether the last file of the part exists."""
        return (self.folder / (SUMMARY_NAME if self.name == "train" else MANIFEST_NAME)).exists()

    def started_with(self) -> dict[str, Any]:
        """The settings in the file. Raises `ConfigInvalid` for a file that cannot be read."""
        try:
            return dict(yaml.safe_load(self.config_path.read_bytes()))
        except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
            raise ConfigInvalid(
                str(self.config_path),
                found=type_and_line(error),
                wanted="the settings of a part, as `coldstill rounds` wrote them",
                fix="delete this file: the part's own output is compared with the settings when it runs",
            ) from None

    def write_config(self) -> None:
        """Write the settings, whole or not at all."""
        with new_file(self.config_path) as beside:
            text = yaml.safe_dump(dict(self.settings), sort_keys=False, allow_unicode=True)
            beside.write_text(f"# {self.words}\n{text}", encoding="utf-8")


def part_folder(output: Path, number: int, name: PartName) -> Path:
    """The folder of a part of round `number`."""
    return output / f"round-{number:02}" / name


def student_folder(output: Path, number: int) -> Path:
    """The finished student of round `number`."""
    return part_folder(output, number, "train") / STUDENT_FOLDER


def parts_of(config: RoundsConfig) -> list[Part]:
    """All parts of all rounds, in their order."""
    return [part for number in range(config.rounds) for part in _parts_of_round(config, number)]


def _parts_of_round(config: RoundsConfig, number: int) -> list[Part]:
    output = Path(config.output)
    last = config.student.model if number == 0 else str(student_folder(output, number - 1))
    folders = {name: part_folder(output, number, name) for name in HEADINGS}
    settings: dict[PartName, dict[str, Any]] = {
        "answers": {
            "output": str(folders["answers"]),
            "mode": "generate",
            "source": _stated(config.source),
            "teacher": {
                "model": last,
                **config.writer.model_dump(mode="json"),
                "max_images": min(config.writer.max_images, config.teacher.max_images),
                "top_k": _ANSWERS_TOP_K,
                "draws": 0,
            },
            "sampling": {**_stated(config.sampling), "seed": config.sampling.seed + number},
            "calibration_targets": 0,
            **_shared(config),
        },
        "scores": {
            "output": str(folders["scores"]),
            "source": {"rows_of": str(folders["answers"]), "round": number},
            "teacher": stated_teacher(config.teacher),
            **_shared(config),
        },
        "train": _training(config, number, student=str(last)),
    }
    return [Part(round=number, name=name, folder=folders[name], settings=settings[name]) for name in HEADINGS]


def _shared(config: RoundsConfig) -> dict[str, Any]:
    cluster = _stated(config.cluster)
    return {
        "rows_per_unit": config.rows_per_unit,
        "order": config.order,
        **({"cluster": cluster} if cluster else {}),
    }


def _training(config: RoundsConfig, number: int, *, student: str) -> dict[str, Any]:
    output = Path(config.output)
    scores = [str(part_folder(output, earlier, "scores")) for earlier in range(number + 1)]
    datasets = [*config.start_datasets, *scores]
    weights = [config.decay ** (number + 1)] * len(config.start_datasets)
    weights += [config.decay ** (number - earlier) for earlier in range(number + 1)]
    training = _stated(config.training)
    if number < config.rounds - 1:
        training.pop("push_to_hub", None)  # the last round's student alone is published
    return {
        "dataset": datasets if len(datasets) > 1 else datasets[0],
        "output": str(part_folder(output, number, "train")),
        "student": {**_stated(config.student), "model": student},
        **({"eval_dataset": config.eval_dataset} if config.eval_dataset is not None else {}),
        "loss": _stated(config.loss),
        "data": {
            **_stated(config.data),
            "seed": config.data.seed + number,
            **({"weights": weights} if len(datasets) > 1 else {}),
        },
        **({"training": training} if training else {}),
    }


def stated_teacher(teacher: TeacherConfig) -> dict[str, Any]:
    """The stated settings, and how much of a distribution is kept: what is not set there depends on other settings and
    on the release."""
    kept = {name: getattr(teacher, name) for name in ("top_k", "draws", "kept_draws", "draw_method")}
    return {**_stated(teacher), **kept}


def _stated(section: Any) -> dict[str, Any]:
    """A section's settings without those that have their default value, as YAML types."""
    stated: dict[str, Any] = section.model_dump(mode="json", exclude_defaults=True)
    return stated
