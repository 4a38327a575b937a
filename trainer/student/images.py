"""Decides whether a student reads images, loads its processor, and makes the row with an image that it is checked by.

A student reads images if its configuration belongs to a model that sees some and its processor is saved beside it.
Without a processor it is loaded as it was before: as a language model, if transformers has such a class for it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig
from PIL import Image
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoProcessor
from transformers.utils import logging

from coldstill.common.processor import ImageExpander, load_processor, sees_images, type_input_of
from coldstill.storage_schema.tokenizer import TOKENIZER_FILES
from coldstill.trainer.config import StudentConfig
from coldstill.trainer.data.images import StudentImages, sees_no_images
from coldstill.trainer.data.logit_dataset import LogitDataset
from coldstill.trainer.data.stream import packing_of_images
from coldstill.trainer.errors import ImageTokenMismatch, StudentNotFound

from .forward import innermost
from .load import student_not_found
from .lora import is_adapter
from .positions import context_of, virtual_tokens

logger = logging.get_logger(__name__)

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""The only names that a processor's files have, beside those of its tokenizer (a chat template is one of these): they
are written beside the weights of the finished student."""
STUDENT_FILES = (*TOKENIZER_FILES, *PROCESSOR_FILES)
_CONFIG = "config.json"
_IMAGES = "_student_images"
_PROBE_TEXT = 16
"""Tokens of text before and after the image of a probe."""
_PROBE_SIZE = (64, 48)


class Probe(NamedTuple):
    """A row with one image as a student reads it: `tokens int64 [T]`, and its other `inputs`."""

    tokens: torch.Tensor
    inputs: dict[str, torch.Tensor]


def model_folder(name: str) -> Path:
    """Local folder of the student `name` with its configuration and the files of its tokenizer and processor; those of
    a hub name are downloaded. Raises `StudentNotFound`."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=[*STUDENT_FILES, _CONFIG]))
    except (OSError, ValueError) as error:
        raise student_not_found(name, error) from error


def processor_files(student: StudentConfig) -> dict[str, bytes]:
    """Name and content of each file of the processor, empty for a student that reads text alone.

    Only names of `PROCESSOR_FILES`. Raises `StudentNotFound`, also for a model that transformers can only load with
    images and that has no processor.
    """
    if isinstance(student.from_scratch, dict):
        _require_language_model(student, AutoConfig.for_model(**student.from_scratch))
        return {}
    folders = _folders(student)
    config = _configuration(folders)
    if config is None or not sees_images(config):
        return {}
    for folder in folders:
        if files := {name: (folder / name).read_bytes() for name in PROCESSOR_FILES if (folder / name).is_file()}:
            return files
    _require_language_model(student, config)
    return {}


def load_images(student: StudentConfig, files: Mapping[str, bytes]) -> StudentImages | None:
    """How the student of `student` reads images, by the files that the finished student gets; None if it reads none.

    `files`: those of its tokenizer and processor by name. Raises `ProcessorUnusable`.
    """
    has_processor = not files.keys().isdisjoint(PROCESSOR_FILES)
    config = _configuration(_folders(student)) if has_processor else None
    if config is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        # By its files alone: a student from scratch has the dataset's tokenizer and another folder's processor.
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        config.save_pretrained(folder)
        found = load_processor(AutoProcessor, folder)
    return StudentImages(found, context_of(config), student.name)


def images_of(model: Any, processing_class: Any = None) -> StudentImages | None:
    """How a loaded model reads images: as `set_images` said, by the processor given, or by the one beside its weights;
    None if it reads none. peft may wrap it. Raises `ProcessorUnusable`."""
    found = _reading(innermost(model), processing_class)
    return None if found is None else replace(found, virtual_tokens=virtual_tokens(model))


def _reading(model: Any, processing_class: Any) -> StudentImages | None:
    if not sees_images(model.config):
        return None
    source = model.config.name_or_path
    if hasattr(processing_class, "image_processor"):
        return StudentImages(processing_class, context_of(model.config), source or type(model).__name__)
    known: StudentImages | None = getattr(model, _IMAGES, None)
    if known is not None:
        return known
    if not source or not any((model_folder(source) / name).is_file() for name in PROCESSOR_FILES):
        return None
    return StudentImages(load_processor(AutoProcessor, source), context_of(model.config), source)


def set_images(model: Any, images: StudentImages | None) -> None:
    """Let `images_of` return `images` for this model object. Raises `ImageTokenMismatch`."""
    if images is not None:
        check_image_token(model.config, images)
        setattr(model, _IMAGES, images)


def check_image_token(config: Any, images: StudentImages) -> None:
    """Raise `ImageTokenMismatch` unless the model puts its patches where the processor expects them."""
    stated = image_token_of(config)
    ids = [id_ for id_ in images.processor.image_token_ids if id_ is not None]
    if stated is not None and stated not in ids:
        raise ImageTokenMismatch(
            f"image_token_id of the student {images.name}",
            found=f"{stated} in its configuration",
            wanted=f"{', '.join(map(str, ids))}, as in its processor",
            fix="set image_token_id in the student's config.json to the id that its tokenizer has for the image token",
        )


def check_dataset_images(
    dataset: LogitDataset, images: StudentImages | None, model: Any, *, name: str, packs: bool
) -> None:
    """Raise `StudentSeesNoImages`, `PackingUnsupported` or `ProcessorUnusable` if the dataset says that it has images;
    rows say it later.

    A student that sees images may train on text: what sees images gets no gradient then.
    """
    url = dataset.sources.datasets[0].store.url
    if not dataset.shows_images:
        if images is not None:
            without = dataset.sources.without_images
            why = "rows with images are left out" if without else f"{url} does not say that it has any"
            logger.warning(f"{name} sees images, and {why}: rows of text train its text")
    elif (images is None or packs) and not dataset.has_images():
        return
    elif images is None:
        raise sees_no_images(f"training of the student {name} on {url}", "rows with images")
    elif packs:
        raise packing_of_images(f"the rows of {url}", "rows with images")
    else:
        image_probe(images, model)


def image_token_of(config: Any) -> int | None:
    """The id at which a model of this configuration puts the patches of an image; None if it names none."""
    named = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((id_ for id_ in named if id_ is not None), None)


def image_probe(images: StudentImages, model: Any) -> Probe:
    """A row with one image and text, always the same for one processor, as `model` reads it. Raises
    `ProcessorUnusable`."""
    expander = ImageExpander(images.processor)
    width, height = _PROBE_SIZE
    ramp = np.add.outer(5 * np.arange(height), 3 * np.arange(width))[..., None] * np.array([1, 2, 3])
    shown = Image.fromarray((ramp % 256).astype(np.uint8))
    expander.check(shown)
    taken = {expander.placeholder_id, *expander.processor.image_token_ids}
    text = [id_ for id_ in range(4 * _PROBE_TEXT) if id_ not in taken][: 2 * _PROBE_TEXT]
    row = np.array([*text[:_PROBE_TEXT], expander.placeholder_id, *text[_PROBE_TEXT:]], np.int64)
    (expanded,), inputs = expander.expand([row], positions=[np.array([_PROBE_TEXT])], images=[[shown]])
    tokens = torch.from_numpy(expanded.token_ids)
    if (name := type_input_of(type(model).forward)) is not None:
        inputs[name] = torch.from_numpy(expander.token_types(expanded.token_ids))[None]
    return Probe(tokens, inputs)


def _folders(student: StudentConfig) -> list[Path]:
    """Where the files of the student may be: its own folder, and that of the model below its adapters."""
    if student.model is None:
        return [model_folder(str(student.from_scratch))]
    try:
        is_adapters = is_adapter(student.model)
        base = PeftConfig.from_pretrained(student.model).base_model_name_or_path if is_adapters else None
    except (OSError, ValueError) as error:
        raise student_not_found(student.name, error) from error
    return [model_folder(student.model), *([model_folder(base)] if base else [])]


def _configuration(folders: list[Path]) -> Any:
    """The model's configuration; None if transformers reads none, which loading the model then names."""
    for folder in folders:
        if (folder / _CONFIG).is_file():
            try:
                return AutoConfig.from_pretrained(folder, trust_remote_code=False)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return None
    return None


def _require_language_model(student: StudentConfig, config: Any) -> None:
    if sees_images(config) and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise StudentNotFound(
            f"student {student.name}",
            found=f"model_type {config.model_type}, which sees images, without a processor",
            wanted=f"a folder with {' or '.join(PROCESSOR_FILES[:2])} beside config.json",
            fix="save the model's processor there: AutoProcessor.from_pretrained(...).save_pretrained(FOLDER)"
            + ("; from_scratch then names this folder" if student.model is None else ""),
        )
