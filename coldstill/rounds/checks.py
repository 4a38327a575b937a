"""Checks before the first answer is written: what the teacher and the training would refuse hours later."""

from __future__ import annotations

import re

from coldstill.common.errors import ColdstillError
from coldstill.pipeline.config import CaptureConfig, TeacherConfig
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.header_facts import RowWriter
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, TokenizerFacts, fingerprint_bytes, require_same_ids
from coldstill.trainer.errors import NotStudentRows
from coldstill.trainer.losses.base import Loss, other_rows_fix

from .config import RoundsConfig, WriterConfig
from .parts import Part

_KEY = re.compile(r"\bteacher\.(\w+)")
_KEYS_OF_ROUNDS = {name: f"writer.{name}" for name in WriterConfig.model_fields} | {"model": "student.model"}
"""Keys of `teacher` in the capture of the answers, whose teacher is the student."""


def require_usable_models(config: RoundsConfig, parts: list[Part]) -> None:
    """Read tokenizer and `config.json` of student and teacher, as their captures do, folders and models of the Hub.

    Raises `TokenizerMismatch` and what `load_tokenizer` and `load_model_config` raise, and for given datasets what
    `open_dataset` raises and `NotStudentRows`.
    """
    answers, scores = (CaptureConfig.model_validate(part.settings).teacher for part in parts[:2])
    if all(part.is_done for part in parts):
        return
    teacher = None
    if not parts[1].is_done:  # the capture of the scores made the same check
        try:
            student = _tokenizer_facts(answers)
        except ColdstillError as error:
            raise _with_keys_of_rounds(error) from None
        teacher = _tokenizer_facts(scores)
        require_same_ids(
            f"tokenizer of the student {answers.model}",
            student.ids,
            teacher.ids,
            of=scores.model,
            fix="choose a student of the teacher's family",
        )
    given = {"start_datasets": config.start_datasets, "eval_dataset": (config.eval_dataset,)}
    headers = [(key, path, open_dataset(path).header) for key, paths in given.items() for path in paths if path]
    for key, path, header in headers:
        teacher = teacher or _tokenizer_facts(scores)
        fix = "choose a dataset of the same tokenizer"
        require_same_ids(f"tokenizer of {key} {path}", header.ids, teacher.ids, of=scores.model, fix=fix)
        if key == "start_datasets":
            _require_student_rows(config, path, header)


def _with_keys_of_rounds(error: ColdstillError) -> ColdstillError:
    """An error of the capture in which the student is the teacher, with the keys that these settings have."""

    def renamed(text: object) -> str:
        return _KEY.sub(lambda key: _KEYS_OF_ROUNDS.get(key[1], key[0]), str(text))

    found = None if error.found is None else renamed(error.found)
    wanted = None if error.wanted is None else renamed(error.wanted)
    return type(error)(renamed(error.what), found=found, wanted=wanted, fix=renamed(error.fix))


def _tokenizer_facts(model: TeacherConfig) -> TokenizerFacts:
    """Also checks that the model's context and ids fit the settings of its capture."""
    # These load torch and transformers, and `coldstill rounds --help` should be quick.
    from coldstill.pipeline.teachers.checkpoint import load_model_config, load_tokenizer, tokenizer_files

    data = tokenizer_files(load_tokenizer(model))[TOKENIZER_FILE]
    facts = fingerprint_bytes(data, where=f"{model.model}: {TOKENIZER_FILE}")
    load_model_config(model, facts)
    return facts


def _require_student_rows(config: RoundsConfig, path: str, header: DatasetHeader) -> None:
    """Raise `NotStudentRows` if the training of any round would: it accepts one writer for each round."""
    if not isinstance(config.loss, Loss) or "student_rows" not in config.loss.all_needs:
        return
    from coldstill.trainer.student.writer import as_own, foreign_writers, student_fingerprints  # loads torch

    found, writer = "rows that the source or the teacher wrote, or a student under another prompt", header.about.writer
    if header.about.is_by_student and writer is not None:
        names = student_fingerprints(str(config.student.model))
        own, writer = names[0] if names else None, as_own(writer, names) or writer
        trained = RowWriter(name="the student after a round", weights_fingerprint="", round=1)
        first = RowWriter(name=str(config.student.model), weights_fingerprint=own or "", round=0)
        if (
            own
            and not foreign_writers([writer, first], own=own)
            and writer not in foreign_writers([writer, first, trained], own=trained.weights_fingerprint)
        ):
            return
        found = f"rows that {writer.name} wrote in round {writer.round}, weights {writer.weights_fingerprint}"
    raise NotStudentRows(
        f"start_datasets {path}",
        found=found,
        wanted=f"rows that {config.student.model} wrote in round 0 and the teacher scored, for loss {config.loss.name}",
        fix=f"remove it, or {other_rows_fix(config.loss)}",
    )
