"""The student's tokenizer: its files, and the check against the dataset's ids."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from coldstill.common.errors import first_line
from coldstill.common.visible import visible
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import TokenizerMismatch, TokenizerNotFound
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.tokenizer import (
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    TOKENIZER_FOLDER,
    fingerprint_bytes,
    first_difference,
    load_faithfully,
    require_same_ids,
    splits_alike,
)
from coldstill.trainer.config import StudentConfig
from coldstill.trainer.data.logit_dataset import LogitDataset
from coldstill.trainer.errors import StudentNotFound

from .forward import innermost
from .images import PROCESSOR_FILES, STUDENT_FILES, images_of, load_images, model_folder, processor_files, set_images
from .load import SpecialTokens, check_head, load_student, student_not_found

logger = logging.getLogger(__name__)


def tokenizer_files(student: StudentConfig, dataset: Dataset) -> dict[str, bytes]:
    """Name and content of each tokenizer file: the student's own, or the dataset's for a student from scratch.

    Only names of `TOKENIZER_FILES`: these files are written beside the weights of the finished student.

    Raises `StudentNotFound`, `TokenizerNotFound`, and what `Dataset.read_file` raises.
    """
    if student.model is None:
        files = dataset.tokenizer_files()
    else:
        folder = model_folder(student.model)
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if TOKENIZER_FILE not in files:
        raise TokenizerNotFound(
            f"tokenizer of the student {student.name}",
            found=f"no {TOKENIZER_FILE}" + (f", only {', '.join(sorted(files))}" if files else ""),
            wanted=f"a {TOKENIZER_FILE}, as the tokenizers library writes it",
            fix=_student_inside(student) or _how_to_save(dataset),
        )
    return files


def files_to_save(model: Any, dataset: Dataset) -> dict[str, bytes]:
    """Name and content of each tokenizer and processor file for a folder of the student `model`: those beside its
    weights, or the dataset's tokenizer for one made in memory. Only names of `STUDENT_FILES`.

    Raises what `tokenizer_files` raises.
    """
    config = StudentConfig(model=model) if isinstance(model, str) else model
    if isinstance(config, StudentConfig):
        return tokenizer_files(config, dataset) | processor_files(config)
    source = innermost(model).config.name_or_path
    try:
        folder = model_folder(source) if source else None
    except StudentNotFound:
        folder = None
    if folder is None or not (folder / TOKENIZER_FILE).is_file():
        return dataset.tokenizer_files()
    return {name: (folder / name).read_bytes() for name in STUDENT_FILES if (folder / name).is_file()}


def _student_inside(student: StudentConfig) -> str:
    """The question whether the student of a training was meant, if its output was given; empty otherwise."""
    inside = Path(student.model or "", "student")
    return f"did you mean {inside}?" if (inside / TOKENIZER_FILE).is_file() else ""


def _how_to_save(dataset: Dataset) -> str:
    """What a program must do whose student has no tokenizer beside its weights; the student may have the dataset's."""
    own = f"; that of the dataset is in {dataset.store.url}/{TOKENIZER_FOLDER}" if dataset.tokenizer_files() else ""
    return f"pass the tokenizer to DistillTrainer as processing_class, or save it there with `save_pretrained`{own}"


def check_tokenizer(tokenizer_json: bytes, header: DatasetHeader, *, name: str, dataset: Dataset | None = None) -> None:
    """Raise `TokenizerMismatch` unless the student's and the teacher's ids have equal meanings.

    `dataset`: the one whose tokenizer files are compared too, before a warning that text is split in another way.

    Also raises `TokenizerNotFound`, if `tokenizer_json` is not a tokenizer.
    """
    facts = fingerprint_bytes(tokenizer_json, where=f"tokenizer of the student {name}")
    require_same_ids(
        f"tokenizer of the student {name}",
        facts.ids,
        header.ids,
        of=header.teacher.name,
        fix="choose a student of the teacher's family, or capture with a teacher of the student's family",
    )
    stored = header.about.tokenizer_pipeline_sha256
    if stored is not None and stored != facts.pipeline_sha256 and not _splits_as(dataset, tokenizer_json):
        logger.warning(
            "The tokenizer of the student %s splits text in another way than the teacher's (%s), though equal ids mean "
            "equal tokens. The dataset's targets can be used; the student will see other ids for the same new text.",
            name,
            header.teacher.name,
        )


def _splits_as(dataset: Dataset | None, tokenizer_json: bytes) -> bool:
    if dataset is None:
        return False
    try:
        stored = dataset.tokenizer_files()[TOKENIZER_FILE]
        fingerprint_bytes(stored, where="tokenizer of the dataset")  # bounds its size and its number of values
        return splits_alike(tokenizer_json, stored)
    except (TokenizerNotFound, KeyError, RecursionError):
        return False


def check_processing_class(tokenizer: Any, dataset: Dataset, *, name: str) -> None:
    """Apply the rule of `check_tokenizer` to a tokenizer of transformers, or to that of a processor.

    A slow tokenizer has no `tokenizer.json`: each of its ids must be the same token as in the dataset's tokenizer.
    Raises `TokenizerMismatch`, and `TokenizerNotFound` for an object without a vocabulary.
    """
    if hasattr(tokenizer, "image_processor"):
        tokenizer = tokenizer.tokenizer
    if not hasattr(tokenizer, "get_vocab"):
        raise TokenizerNotFound(
            f"processing_class of the student {name}",
            found=f"a {type(tokenizer).__name__}, which has no vocabulary",
            wanted="a tokenizer of transformers",
            fix="pass the tokenizer itself, such as `processor.tokenizer`",
        )
    if tokenizer.is_fast:
        check_tokenizer(tokenizer.backend_tokenizer.to_str().encode(), dataset.header, name=name, dataset=dataset)
        return
    wanted = Tokenizer.from_str(dataset.tokenizer_files()[TOKENIZER_FILE].decode()).get_vocab(with_added_tokens=True)
    found = tokenizer.get_vocab()
    if found != wanted:
        differing = sorted(token for token in {*found, *wanted} if found.get(token) != wanted.get(token))
        raise TokenizerMismatch(
            f"tokenizer of the student {name}",
            found=f"{len(found)} tokens, of which {visible(repr(differing[0]))} has the id {found.get(differing[0])}",
            wanted=f"{len(wanted)} tokens, of which it has the id {wanted.get(differing[0])} "
            f"({dataset.header.teacher.name})",
            fix="choose a student of the teacher's family, or capture with a teacher of the student's family",
        )


def check_model_tokenizer(model: Any, dataset: Dataset, *, name: str) -> None:
    """Apply the rule of `check_tokenizer` to the tokenizer beside the weights of a loaded `model`.

    Logs a warning if there is none: the model was made in memory, or its folder or Hub repository has no
    `tokenizer.json`.
    """
    source = getattr(getattr(model, "config", None), "name_or_path", "")
    try:
        path = model_folder(source) / TOKENIZER_FILE if source else None
    except StudentNotFound:
        path = None
    if path is not None and path.is_file():
        check_tokenizer(path.read_bytes(), dataset.header, name=name, dataset=dataset)
        return
    logger.warning(
        "The tokenizer of %s was not checked: no %s %s. Training and evaluation use the dataset's ids (%s) with this "
        "model, and training saves the dataset's tokenizer with it. Pass its own as processing_class, to check the ids "
        "and to save it instead.",
        name,
        TOKENIZER_FILE,
        f"is in {source}" if source else "belongs to a model that was not loaded from a folder or the Hub",
        dataset.header.teacher.name,
    )


@dataclass(frozen=True)
class StudentTokenizer:
    """The student's own `tokenizer` of transformers, its `tokenizer.json`, and the student's name for messages."""

    tokenizer: PreTrainedTokenizerBase
    tokenizer_json: bytes
    name: str


def other_tokenizer(model: Any, dataset: LogitDataset, tokenizer: Any = None) -> StudentTokenizer | None:
    """The tokenizer of the student `model` if its ids are not the dataset's; `tokenizer` is preferred to the one beside
    its weights. None too if none is found, or none that the tokenizers library wrote: `checked_student` says so. A
    student from scratch has the dataset's.

    Raises `StudentNotFound`, `TokenizerNotFound`, `TokenizerUnfaithful`.
    """
    if isinstance(model, StudentConfig) and model.model is None:
        return None
    named = isinstance(model, str | StudentConfig)
    path_name = (model if isinstance(model, str) else model.model) if named else innermost(model).config.name_or_path
    name = str(path_name or type(innermost(model)).__name__)
    if hasattr(tokenizer, "image_processor"):
        tokenizer = tokenizer.tokenizer
    beside = None
    try:
        path = model_folder(path_name) / TOKENIZER_FILE if path_name else None
        beside = path.read_bytes() if path is not None and path.is_file() else None
    except StudentNotFound:
        pass
    written = beside
    if tokenizer is not None:
        if not getattr(tokenizer, "is_fast", False):
            return None
        written = tokenizer.backend_tokenizer.to_str().encode()
    if written is None or not has_other_ids(written, dataset.header, name=name):
        return None
    if named and beside is not None and _fingerprint(beside, name) != _fingerprint(written, name):
        return None  # two tokenizers of one student: `checked_student` rejects one of them
    return StudentTokenizer(load_tokenizer(name) if tokenizer is None else tokenizer, written, name)


def has_other_ids(tokenizer_json: bytes, header: DatasetHeader, *, name: str) -> bool:
    """Whether the ids of this tokenizer have other meanings than those of the dataset. Raises `TokenizerNotFound`."""
    return _fingerprint(tokenizer_json, name) != header.tokenizer_fingerprint


def _fingerprint(tokenizer_json: bytes, name: str) -> str:
    return fingerprint_bytes(tokenizer_json, where=f"tokenizer of the student {name}").fingerprint


def checked_student(
    model: Any,
    dataset: LogitDataset,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    own_header: DatasetHeader | None = None,
) -> tuple[Any, str]:
    """The student and its name in messages, after the check of its head and token ids.

    `own_header`: the dataset's header with the ids of the student's own tokenizer, if they are others.

    A `model` given as a folder or hub name, or as a `StudentConfig`, is loaded. `tokenizer` is preferred to the one
    beside the weights of a model object, because its head may have been extended in memory. `images_of` then returns
    how the student reads images: by its own processor, or by `tokenizer` if that is a processor.

    Raises `TokenizerMismatch`, `TokenizerNotFound`, `ProcessorUnusable`, `ImageTokenMismatch`, and what `load_student`
    raises.
    """
    first = dataset.sources.datasets[0]
    header = dataset.header if own_header is None else own_header
    config = StudentConfig(model=model) if isinstance(model, str) else model
    if not isinstance(config, StudentConfig):
        plain = innermost(model)
        name = plain.config.name_or_path or type(plain).__name__
        check_head(plain, header, name=name)
        if own_header is not None:
            pass
        elif tokenizer is None:
            check_model_tokenizer(plain, first, name=name)
        else:
            check_processing_class(tokenizer, first, name=name)
        set_images(plain, images_of(plain, tokenizer))
        return model, name
    if tokenizer is not None and own_header is None:
        check_processing_class(tokenizer, first, name=config.name)
    special, files = None, dict[str, bytes]()
    try:
        files = tokenizer_files(config, first)
    except TokenizerNotFound:
        if tokenizer is None:
            raise
    else:
        if own_header is None:
            check_tokenizer(files[TOKENIZER_FILE], header, name=config.name, dataset=first)
        special = special_tokens(files, header)
    return load_with_images(config, header, special, files=files), config.name


def load_with_images(
    config: StudentConfig, header: DatasetHeader, special: SpecialTokens | None = None, *, files: Mapping[str, bytes]
) -> Any:
    """The student of `config`, of which `images_of` returns how it reads images.

    `files`: those of its tokenizer and, unless they are beside its weights, of its processor.

    Raises `ProcessorUnusable`, `ImageTokenMismatch`, and what `load_student` raises.
    """
    if files.keys().isdisjoint(PROCESSOR_FILES):
        files = {**files, **processor_files(config)}
    images = load_images(config, files)
    token = None if images is None else images.processor.image_token_ids[0]
    model = load_student(config, header, special, image_token=token)
    set_images(innermost(model), images)
    return model


def special_tokens(files: Mapping[str, bytes], header: DatasetHeader) -> SpecialTokens:
    """The special tokens of the tokenizer in `files`, and the ids at which the teacher of the dataset stops."""
    ids = Tokenizer.from_str(files[TOKENIZER_FILE].decode())
    stated: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            document = json.loads(files.get(name, b"{}"))
        except (ValueError, RecursionError):
            continue
        stated |= document if isinstance(document, dict) else {}

    def find(kind: str) -> int | None:
        token = stated.get(kind)
        token = token.get("content") if isinstance(token, dict) else token
        found: int | None = ids.token_to_id(token) if isinstance(token, str) else None
        return found

    eos = find("eos_token")
    ends = dict.fromkeys([*(() if eos is None else (eos,)), *(header.about.end_token_ids or ())])
    return SpecialTokens(
        bos=find("bos_token"),
        pad=find("pad_token"),
        ends=tuple(end for end in ends if end < header.token_count),
        token_count=header.token_count,
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the student `name`, a folder or Hub name.

    Raises `StudentNotFound`, and `TokenizerUnfaithful` for one that transformers rebuilds wrongly.
    """
    # Without trust_remote_code=False, transformers asks on a terminal whether to run a stranger's code.
    loaders = [
        lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=False),
        lambda: PreTrainedTokenizerFast.from_pretrained(name),
    ]
    path = model_folder(name) / TOKENIZER_FILE
    try:
        tokenizer: PreTrainedTokenizerBase = load_faithfully(
            loaders, path.read_bytes() if path.is_file() else None, where=name
        )
    except (OSError, ValueError, ImportError) as error:
        raise student_not_found(name, error) from error
    return tokenizer


def warn_if_unfaithful(folder: Path) -> None:
    """Log a warning if transformers rebuilds the tokenizer in a finished student's folder as a class that differs from
    its file: the class follows from the model's type too, which may be another one than the teacher's."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        found = first_difference(tokenizer, (folder / TOKENIZER_FILE).read_bytes())
    except Exception as error:  # of any class: the run is over, and must not be lost to its last check
        found = first_line(error)
    if found:
        logger.warning(
            "AutoTokenizer loads the tokenizer in %s wrongly (%s): load it with PreTrainedTokenizerFast", folder, found
        )
