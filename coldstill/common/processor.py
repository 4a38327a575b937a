"""Processors of transformers: how a model's family expands the placeholders of images, and makes its inputs.

A dataset counts positions with ONE placeholder token for each image. A family writes many tokens in its place: patches,
and often tokens around them. The processor says which, image by image; the other tokens of a row are the stored ones,
never text that is tokenized again. This file imports no library of models, as all of this folder.

Shape letters: `T` tokens of a row, `P` images of a row, `N` positions. Token ids are int64 arrays.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import ColdstillError, first_line

if TYPE_CHECKING:
    from PIL import Image

_OF_TEXT = (
    *("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets"),
    "labels",  # of PaliGemma, for the suffix of a text that is not the row's
)
"""What a processor returns for the text; the rest belongs to the images."""
_TORCHVISION = "torchvision"
_SIZES = (
    *("size", "crop_size", "max_image_size", "do_image_splitting", "do_resize", "resample", "do_rescale"),
    *("rescale_factor", "do_normalize", "image_mean", "image_std", "do_center_crop", "do_pad", "pad_size"),
    *("min_pixels", "max_pixels", "patch_size", "merge_size", "temporal_patch_size", "image_grid_pinpoints"),
    *("crop_to_patches", "min_patches", "max_patches", "do_pan_and_scan", "pan_and_scan_max_num_crops"),
    *("pan_and_scan_min_crop_size", "pan_and_scan_min_ratio_to_activate", "downsample_ratio", "max_dynamic_tiles"),
    *("image_seq_len", "image_seq_length", "num_additional_image_tokens", "vision_feature_select_strategy"),
)
"""Settings that decide how many patches an image becomes, and what is in them."""


class ProcessorUnusable(ColdstillError):
    """A model's processor cannot be loaded, or does not say how it expands an image.

    Fix: save the model's processor beside it with `save_pretrained`, install a newer release of transformers, or choose
    a model of the families that docs/vision_models.md lists.
    """


class Expanded(NamedTuple):
    """A row as a model reads it: `token_ids int64 [T]`, and the tokens that each image became, `lengths int64 [P]`."""

    token_ids: np.ndarray
    lengths: np.ndarray


def sees_images(config: Any) -> bool:
    """Whether a configuration of transformers belongs to a model that reads images beside text."""
    return hasattr(config, "vision_config") and config.get_text_config(decoder=True) is not config


def load_processor(auto: Any, name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The processor of a model, a folder or Hub name. `auto`: transformers' `AutoProcessor`.

    Raises `ProcessorUnusable`.
    """
    try:
        processor = auto.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, AttributeError, TypeError) as error:
        needs = _TORCHVISION in str(error).lower()
        raise ProcessorUnusable(
            f"processor of {name}",
            found=first_line(error),
            wanted="preprocessor_config.json or processor_config.json of a model that sees images",
            fix="pip install 'coldstill[vision]', which brings torchvision" if needs else "save it beside the model",
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ProcessorUnusable(
            f"processor of {name}",
            found=f"a {type(processor).__name__}",
            wanted="one with an image processor and a tokenizer",
            fix="save the model's processor beside it: `AutoProcessor.from_pretrained(...).save_pretrained(FOLDER)`",
        )
    return processor


def processor_settings(processor: Any) -> dict[str, Any]:
    """The settings that decide how many patches an image becomes, and the token id of the placeholder, as JSON."""
    stated = {**_json(processor.image_processor), **_json(processor)}
    found = {name: stated[name] for name in _SIZES if stated.get(name) is not None}
    return {"image_token_id": placeholder_id(processor), **found}


def processor_sha256(processor: Any) -> str:
    """Digest of all settings of a processor but those of its tokenizer and of its chat template.

    A processor that runs on PIL and one that runs on torchvision have equal digests.
    """
    said = {"processor": _json(processor), "image_processor": _json(processor.image_processor)}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def placeholder_id(processor: Any) -> int:
    """The token that stands for one image where a chat template is rendered. Raises `ProcessorUnusable`."""
    token = _placeholder(processor)
    id_ = processor.tokenizer.convert_tokens_to_ids(token) if token else None
    if not isinstance(id_, int) or id_ == getattr(processor.tokenizer, "unk_token_id", None):
        raise ProcessorUnusable(
            f"processor {type(processor).__name__}",
            found=f"the placeholder {token!r}, which is not one token",
            wanted="one token that stands for an image",
        )
    return id_


def expanded_positions(positions: np.ndarray, *, images: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`int64 [N]`: where a model that expands the images of a row has its `positions`, which count one token each.

    `images int64 [P]`: indices of the placeholders, ascending; `lengths int64 [P]`: tokens that each becomes. The
    position of a placeholder is that of the last token of its image: what it predicts is the token after the image.
    """
    added = np.concatenate(([0], np.cumsum(np.asarray(lengths, np.int64) - 1)))
    return np.asarray(positions, np.int64) + added[np.searchsorted(images, positions, side="right")]


class ImageExpander:
    """Expands stored rows as one processor does, and makes the inputs of the images. Not thread-safe."""

    def __init__(self, processor: Any):
        """Raises `ProcessorUnusable` for a processor without a placeholder token."""
        self.processor = processor
        self.placeholder_id = placeholder_id(processor)
        self._token = str(_placeholder(processor))
        self._ids: dict[str, np.ndarray] = {}

    def expand(
        self, rows: Sequence[np.ndarray], *, positions: Sequence[np.ndarray], images: Sequence[Sequence[Image.Image]]
    ) -> tuple[list[Expanded], dict[str, Any]]:
        """The rows with their images expanded, and the model's inputs for the images of all rows in order.

        `rows`: the stored token ids of each; `positions`: the indices of its placeholders; `images`: their images.
        Rows without images stay as they are, and if none has any, there are no inputs. Raises `ProcessorUnusable`.
        """
        shown = [list(each) for each in images if len(each)]
        if not shown:
            return [Expanded(np.asarray(row, np.int64), np.empty(0, np.int64)) for row in rows], {}
        tokenizer = self.processor.tokenizer
        pads = tokenizer.pad_token is not None
        if not pads:  # as Llama's: any token of text will do, because the ids of this call are not used
            taken = {self.placeholder_id, *self.processor.image_token_ids}
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(next(id_ for id_ in range(99) if id_ not in taken))
        try:
            made = self.processor(
                images=shown,
                text=[self._token * len(each) for each in shown],
                padding=True,
                return_tensors="pt",
                return_text_replacement_offsets=True,
            )
            replacements = iter([[str(one["replacement"]) for one in row] for row in made["text_replacement_offsets"]])
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise self._unusable(first_line(error)) from error
        finally:
            if not pads:
                tokenizer.pad_token = None
        expanded = []
        for row, at, of_row in zip(rows, positions, images, strict=True):
            texts = next(replacements) if len(of_row) else []
            if not len(at) == len(of_row) == len(texts):
                raise self._unusable(f"{len(texts)} expansions for {len(of_row)} images at {len(at)} placeholders")
            expanded.append(self._replaced(np.asarray(row, np.int64), at, [self._encoded(text) for text in texts]))
        return expanded, {name: value for name, value in made.items() if name not in _OF_TEXT}

    def check(self, image: Image.Image) -> None:
        """Raise `ProcessorUnusable` for a processor that writes text of its own beside an image, as PaliGemma's does.

        Special tokens are no such text: a tokenizer may add `<bos>` to any text, and stored ids have it already.
        """
        (expanded,), _ = self.expand([np.array([self.placeholder_id])], positions=[np.array([0])], images=[[image]])
        theirs = [int(id_) for id_ in self.processor(images=[[image]], text=[self._token])["input_ids"][0]]
        ours, special = expanded.token_ids.tolist(), set(self.processor.tokenizer.all_special_ids)
        for start in range(len(theirs) - len(ours) + 1):
            beside = theirs[:start] + theirs[start + len(ours) :]
            if theirs[start : start + len(ours)] == ours and special.issuperset(beside):
                return
        raise ProcessorUnusable(
            f"processor {type(self.processor).__name__}",
            found=f"{len(theirs)} tokens for a text that is one image, which becomes {len(ours)} of them",
            wanted="a processor that writes no text of its own beside an image",
            fix="choose a model of another family: docs/vision_models.md lists those that were run",
        )

    def token_types(self, token_ids: np.ndarray) -> np.ndarray:
        """`int64`, of the shape of `token_ids`: 1 where a token is a patch of an image, else 0, as transformers has
        them."""
        return np.isin(token_ids, [id_ for id_ in self.processor.image_token_ids if id_ is not None]).astype(np.int64)

    def _replaced(self, row: np.ndarray, at: Sequence[int] | np.ndarray, replaced: list[np.ndarray]) -> Expanded:
        parts, before = [], 0
        for place, ids in zip(at, replaced, strict=True):
            parts += [row[before:place], ids]
            before = place + 1
        return Expanded(np.concatenate([*parts, row[before:]]), np.array([ids.size for ids in replaced], np.int64))

    def _encoded(self, text: str) -> np.ndarray:
        if text not in self._ids:
            self._ids[text] = np.array(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
        return self._ids[text]

    def _unusable(self, found: str) -> ProcessorUnusable:
        return ProcessorUnusable(
            f"processor {type(self.processor).__name__}",
            found=found,
            wanted="one that returns the text that replaces each image (return_text_replacement_offsets)",
            fix="install a newer release of transformers, or choose a model of another family",
        )


def type_input_of(forward: Any) -> str | None:
    """The argument of a model's forward pass that takes `ImageExpander.token_types`; None if it has none."""
    names = inspect.signature(forward).parameters
    return next((name for name in ("mm_token_type_ids", "token_type_ids") if name in names), None)


def _placeholder(processor: Any) -> str | None:
    """The text of the placeholder. Gemma 3's template writes `boi_token`, which its processor replaces."""
    return getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)


def _json(part: Any) -> Mapping[str, Any]:
    """Settings of a processor or of a part of it, without the names of classes and of files."""
    stated = json.loads(json.dumps(part.to_dict(), default=str))
    left_out = {"tokenizer", "image_processor", "video_processor", "feature_extractor", "chat_template"}
    return {
        name: value
        for name, value in stated.items()
        if name not in left_out and not name.endswith(("_class", "_type")) and not name.startswith("_")
    }
