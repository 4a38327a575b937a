"""Freezes weights of a student by name.

A name is a module's own name, or a part of its path: `model.layers.0`, `embed_tokens`. Families spell the parts of a
model that sees images differently, so three names mean these parts in every family.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from coldstill.trainer.errors import NothingToFreeze

VISION_TOWER, PROJECTOR, LANGUAGE_MODEL = "vision_tower", "projector", "language_model"
_TOWERS = {"vision_tower", "vision_model", "vision_encoder", "vision_backbone", "visual", "image_encoder"}
_PROJECTORS = {
    "projector",
    "multi_modal_projector",
    "mm_projector",
    "connector",
    "mlp1",
    "merger",
    "deepstack_merger_list",
    "modality_projection",
    "embed_vision",
    "image_newline",
}
"""Of transformers' families and of the first InternVL. Qwen's mergers are inside its tower."""
_SHOWN_DEPTH, _MOST_SHOWN = 2, 24


def freeze(model: Any, names: Sequence[str], *, student: str) -> None:
    """Stop the training of the weights that `names` mean. Raises `NothingToFreeze` for a name that means none.

    `model`: a model of transformers. Weights that are shared with another part are frozen there too.
    """
    weights: dict[str, torch.nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        chosen = [path for path in weights if _means(model, name, path)]
        if not chosen:
            raise NothingToFreeze(
                f"student.freeze: {name}",
                found=f"no weight of the student {student} has this name",
                wanted=f"{VISION_TOWER}, {PROJECTOR} or {LANGUAGE_MODEL} if it sees images, or one of its modules: "
                + ", ".join(_modules(model)),
                fix="correct or remove this name",
            )
        for path in chosen:
            weights[path].requires_grad_(False)


def _means(model: Any, name: str, path: str) -> bool:
    """Whether the weight at `path` belongs to what `name` means."""
    parts = path.split(".")
    in_projector, in_tower = not _PROJECTORS.isdisjoint(parts), not _TOWERS.isdisjoint(parts)
    if name == VISION_TOWER:
        return in_tower and not in_projector
    if name == PROJECTOR:
        return in_projector
    if name == LANGUAGE_MODEL and (in_tower or _sees_images(model)):
        return not in_tower and not in_projector and _is_of_language(model, path)
    wanted = name.split(".")
    return any(parts[start : start + len(wanted)] == wanted for start in range(len(parts) - len(wanted) + 1))


def _sees_images(model: Any) -> bool:
    return hasattr(model.config, "vision_config")


def _is_of_language(model: Any, path: str) -> bool:
    owners = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    wanted = {id(weight) for owner in owners if owner is not None for weight in owner.parameters()}
    return id(model.get_parameter(path)) in wanted


def _modules(model: Any) -> list[str]:
    """The modules nearest to the root that have weights."""
    found = [
        name
        for name, part in model.named_modules()
        if 0 <= name.count(".") < _SHOWN_DEPTH and name and next(part.parameters(), None) is not None
    ]
    return found[:_MOST_SHOWN]
