"""Writes docs/vision_models.md: for each family that sees images, what of a training was run.

`python -m tests.trainer.student.vision_table`
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from coldstill.common.errors import ColdstillError
from coldstill.common.processor import ProcessorUnusable
from coldstill.storage_schema.rows import CachedRow
from coldstill.trainer.data.collate import collate
from coldstill.trainer.data.images import Placed, RowExpander, StudentImages
from coldstill.trainer.loss_kernels.fused_head import Objective
from coldstill.trainer.losses.taid import Taid
from coldstill.trainer.student.forward import distill_in_forward, model_inputs
from coldstill.trainer.student.images import check_image_token, image_probe
from coldstill.trainer.student.load import check_attention

from .vision_families import FAMILIES, NEEDS_TORCHVISION, ONLY_BUILT, build, rows_of

PAGE = Path(__file__).resolve().parents[3] / "docs" / "vision_models.md"
COUNTS = (1, 0, 2)
_HEAD = """# Students that see images

Which families of transformers were trained on rows with images, each as a tiny random model made from its
configuration, with its own processor. No family has code of its own in Coldstill: a processor says how many tokens an
image becomes, and the targets move with the text.

- **Processor**: `PIL` is loaded as it is saved, without torchvision. `torchvision` needs it for its video part, which
  was left out in this run; `pip install 'coldstill[vision]'` brings torchvision.
- **Tokens**: that an image of 70 x 40 pixels becomes in the tiny model.
- **Ids**: whether rows with 0 to 2 images become the ids, and the token types, that the processor itself makes of their
  text.
- **Loss in chunks**: whether the loss with the fused head and its gradients are those of the model's own logits.

`python -m tests.trainer.student.vision_table` makes the page, and a test compares it with the code.

| Family | Processor | Tokens | Ids | Loss in chunks |
|---|---|---|---|---|
"""


def page() -> str:
    """The text of the page."""
    lines = [f"| {family} | {' | '.join(cells(family))} |" for family in FAMILIES]
    built = [f"| {family} | not run: {reason} | | | |" for family, reason in ONLY_BUILT.items()]
    return _HEAD + "\n".join([*lines, *built, ""])


def cells(family: str) -> tuple[str, str, str, str]:
    """Processor, tokens, ids and loss of a family, in words."""
    model, processor = build(family)
    where = "torchvision" if family in NEEDS_TORCHVISION else "PIL"
    images = StudentImages(processor, None, family)
    rows = rows_of(processor, COUNTS)
    try:
        check_image_token(model.config, images)
        image_probe(images, model)
        check_attention(model, name=family)
        expander = RowExpander(images)
        read = expander.expand([Placed(row, "here", lambda item: item.data) for row in rows])
    except ProcessorUnusable as error:
        reason = "does not say how it expands an image" if "offsets" in str(error.found) else "writes text of its own"
        return where, "", f"refused: the processor {reason}", ""
    except ColdstillError as error:
        return where, "", f"refused: {error.found}", ""
    own = [own_ids(processor, row) for row in rows]
    equal = all(found.token_ids.tolist() == ids for found, (ids, _) in zip(read.rows, own, strict=True))
    equal &= all(types is None or found.tolist() == types for found, (_, types) in zip(read.types, own, strict=True))
    tokens = 1 + read.rows[0].token_ids.size - rows[0].token_ids.size
    same = same_steps(model, collate(rows, read=read), len(processor.tokenizer))
    return where, str(tokens), "equal" if equal else "DIFFERENT", "equal" if same else "DIFFERENT"


def own_ids(processor: Any, row: CachedRow) -> tuple[list[int], list[int] | None]:
    """Ids, and types if it makes any, that the processor itself makes of the row's text."""
    shown = [Image.open(io.BytesIO(item.data)).convert("RGB") for item in row.media]
    text = processor.tokenizer.decode(row.token_ids)
    if not shown:
        return row.token_ids.tolist(), None
    found = processor(text=[text], images=[shown], add_special_tokens=False, padding=True, return_tensors="pt")
    types = next((found[name] for name in ("mm_token_type_ids", "token_type_ids") if name in found), None)
    return found["input_ids"][0].tolist(), None if types is None else types[0].tolist()


def same_steps(model: Any, batch: dict[str, Any], token_count: int) -> bool:
    """Whether the fused loss and its gradients are those of the model's own logits."""
    found = []
    for fused in (True, False):
        state = distill_in_forward(model, token_count=token_count, fused=fused)
        if fused and state.formula is None:
            return False
        model.zero_grad()
        targets = batch["targets"]
        inputs = model_inputs(batch, model)
        given = {"targets": targets, "objective": Objective(Taid()), "t": 0.4, "weight": 1 / targets.count}
        loss = model(**inputs, **given)["loss"]
        loss.backward()
        grads = {name: it.grad.clone() for name, it in model.named_parameters() if it.grad is not None}
        found.append((loss.detach(), grads))
    (loss, grads), (wanted_loss, wanted) = found
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    sees = any(
        ("vis" in name or "projector" in name) and float(gradient.abs().max()) > 0 for name, gradient in wanted.items()
    )
    return (
        sees
        and grads.keys() == wanted.keys()
        and torch.allclose(loss, wanted_loss, rtol=1e-5)
        and all(torch.allclose(grads[name], wanted[name], rtol=1e-3, atol=1e-5 * largest) for name in wanted)
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
