"""Checks a model's attention: causal, and as the eager implementation of its class computes it.

An implementation of transformers ignores arguments that it does not support. `sdpa` has no soft-cap of attention
scores, so a Gemma 2 computes other logits with it than it was trained for, without an error. The comparison runs a few
tokens through the whole model, so it covers masks and windows too.

- **Scores**: a soft-cap, or a sink, shows only where scores are large. So the first attention layer of each class is
  also compared with its scores multiplied by 64 and by 4,096. The other layers keep theirs: with all layers stretched,
  rounding would grow from layer to layer until it hides every difference.
- **Windows**: sliding windows and chunks longer than `LARGEST_WINDOW` are set to `SMALL_WINDOW` during the comparison,
  so that the probe is longer than each.
- **Precision**: 16-bit weights are float32 while their module computes, one module at a time. If a class does not
  allow it, or the weights are quantized, the model computes in its own dtype.
- **Limit**: a difference counts if it exceeds a share of the largest logit and eight times the effect of one rounding.
  That effect is measured: the eager logits change by it if each score grows by the dtype's epsilon. Eight because the
  two implementations round scores, weights, sums and outputs once each.

This file works on a model's own tensors and imports no library, as all of this folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

PLAIN = "eager"
PROBE_TOKENS = 48
LARGEST_WINDOW, SMALL_WINDOW = 256, 16
STRETCHES = (64.0, 4096.0)
"""With random weights of standard deviation 0.02 and width 64, scores are about 0.03: 4,096 makes them 100, twice the
soft-cap of Gemma 2."""
ROUNDINGS = 8
EPSILON, TOLERANCE = 2.0**-23, 1e-4
"""Of float32. The tolerance is that of the head's probe: rounding causes 1e-6 of the largest logit."""
EPSILON_16_BIT, TOLERANCE_16_BIT = 2.0**-7, 3e-2
"""Of bfloat16, and of float16, which is finer."""
LEAK = 3e-2
"""If later tokens change logits by more than this share of the largest, it is no rounding of any dtype. In an encoder
without `is_decoder` they change them by 38% and more, with random weights."""

_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_chunk_size",
    "attention_window_size",
    "local_attention",
    "window_size",
)
_SCALES = ("scaling", "scale", "softmax_scale", "inv_norm_factor")
"""Names of the factor of the scores in attention modules of transformers."""
_LIBRARY_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ImportError)


class AttentionDifference(NamedTuple):
    """`implementation` gives other logits than the eager one, by `share` of the largest logit."""

    implementation: str
    share: float

    def __str__(self) -> str:
        return (
            f"attention {self.implementation} gives logits that differ from those of {PLAIN} attention by "
            f"{self.share:.1%} of the largest"
        )


@contextmanager
def evaluation_mode(*models: Any) -> Iterator[None]:
    """Evaluation mode for `models` in this context; each of their submodules has its own mode again afterwards."""
    modes = [(part, part.training) for model in models for part in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def use_correct_attention(model: Any) -> AttentionDifference | None:
    """Set `model`, a causal LM of transformers, to eager attention if its own differs, and return the difference.

    None if there is none, or if the model cannot run either. Call it without gradients and autocast. Mode, weights and
    configuration are afterwards as before.
    """
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation in (None, PLAIN):
        return None
    parts = {"": model.config} | {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    own = {key: part._attn_implementation for key, part in parts.items() if part and part._attn_implementation}
    share = None
    try:
        with evaluation_mode(model), _small_windows(model) as tokens:
            share = _share(model, own, tokens=tokens, float32=True)
    except _LIBRARY_ERRORS as error:
        logger.info("attention %s is not compared with %s: %s", implementation, PLAIN, error)
    finally:
        if share is None:
            model.set_attn_implementation(own)
    return None if share is None else AttentionDifference(implementation, share)


def attends_ahead(model: Any) -> bool:
    """Whether logits depend on later tokens, as in a `BertLMHeadModel` that is an encoder. Call it as above."""
    try:
        with evaluation_mode(model):
            whole = _logits(model, PROBE_TOKENS, padded=False)
            weight = model.get_input_embeddings().weight
            ids = [index % weight.shape[0] for index in range(PROBE_TOKENS // 2)]
            other = model(input_ids=_integers(model, [ids + ids[::-1]]), use_cache=False).logits[0].float()
    except _LIBRARY_ERRORS as error:
        logger.info("attention to later tokens is not checked: %s", error)
        return False
    half = PROBE_TOKENS // 2
    return bool((other - whole)[:half].abs().max() > LEAK * whole.abs().max())


def _share(model: Any, own: dict[str, Any], *, tokens: int, float32: bool) -> float | None:
    """The difference that counts, as a share of the largest logit, with the model set to eager; None if none does."""
    small = [it for it in model.parameters() if it.is_floating_point() and it.element_size() < 4]
    exact = not small
    with ExitStack() as stack:
        if small and float32 and can_widen(model):
            stack.enter_context(float32_weights(model))
            exact = True
        try:
            epsilon, tolerance = (EPSILON, TOLERANCE) if exact else (EPSILON_16_BIT, TOLERANCE_16_BIT)
            if "flash" in str(own[""]):  # It computes in 16 bits, whatever its input.
                epsilon, tolerance = EPSILON_16_BIT, TOLERANCE_16_BIT
            for stretch, padded in ((1.0, False), (1.0, True), *((stretch, False) for stretch in STRETCHES)):
                found = _compare(model, own, tokens, stretch, padded, epsilon=epsilon, tolerance=tolerance)
                if found is not None:
                    return found
            return None
        except _LIBRARY_ERRORS:
            if not small or not exact:
                raise
    return _share(model, own, tokens=tokens, float32=False)


def _compare(
    model: Any, own: dict[str, Any], tokens: int, stretch: float, padded: bool, *, epsilon: float, tolerance: float
) -> float | None:
    with _scaled(model, stretch, 1.0):
        model.set_attn_implementation(own)
        found = _logits(model, tokens, padded)
        model.set_attn_implementation(PLAIN)
        if model.config.get_text_config(decoder=True)._attn_implementation != PLAIN:
            raise ValueError("the class has no other implementation")
        wanted = _logits(model, tokens, padded)
    largest, off = float(wanted.abs().max()), float((found - wanted).abs().max())
    if off <= tolerance * largest or largest != largest:
        return None
    with _scaled(model, stretch, 1.0 + epsilon):
        rounding = float((_logits(model, tokens, padded) - wanted).abs().max())
    return None if off <= tolerance * largest + ROUNDINGS * rounding else off / largest


def _logits(model: Any, tokens: int, padded: bool) -> Any:
    """`[T, V]`; with `padded`, those of a row that is followed by as much padding, in a batch with a longer row."""
    weight = model.get_input_embeddings().weight
    ids = [index % weight.shape[0] for index in range(tokens)]
    if not padded:
        return model(input_ids=_integers(model, [ids]), use_cache=False).logits[0].float()
    rows = _integers(model, [ids + ids[::-1], ids + [0] * tokens])
    mask = _integers(model, [[1] * (2 * tokens), [1] * tokens + [0] * tokens])
    return model(input_ids=rows, attention_mask=mask, use_cache=False).logits[1, :tokens].float()


def _integers(model: Any, values: list[list[int]]) -> Any:
    return model.get_input_embeddings().weight.new_tensor(values).long().to(model.device)


@contextmanager
def _small_windows(model: Any) -> Iterator[int]:
    """Windows of at most `LARGEST_WINDOW` in this context; yields the tokens of a probe that is longer than each."""
    holders = [model.config.get_text_config(decoder=True), *model.modules()]
    found = [
        (holder, name, size)
        for holder in holders
        for name in _WINDOWS
        if type(size := getattr(holder, name, None)) is int and size > 0
    ]
    large = [item for item in found if item[2] > LARGEST_WINDOW]
    try:
        for holder, name, _ in large:
            setattr(holder, name, SMALL_WINDOW)
        yield PROBE_TOKENS + max((size for *_, size in found if size <= LARGEST_WINDOW), default=0)
    finally:
        for holder, name, size in large:
            setattr(holder, name, size)


@contextmanager
def _scaled(model: Any, first: float, all_layers: float) -> Iterator[None]:
    """Scores of all attention layers times `all_layers`, and those of the first layer of each class times `first`."""
    scales = []
    classes = set()
    for module in model.modules():
        name = next((name for name in _SCALES if type(getattr(module, name, None)) is float), None)
        if name is not None and "attention" in type(module).__name__.lower():
            factor = all_layers if type(module) in classes else first * all_layers
            classes.add(type(module))
            scales.append((module, name, getattr(module, name), factor))
    try:
        for module, name, scale, factor in scales:
            setattr(module, name, scale * factor)
        yield
    finally:
        for module, name, scale, _ in scales:
            setattr(module, name, scale)


def can_widen(model: Any) -> bool:
    """Whether the weights of `model` are there and not quantized."""
    if getattr(model.config, "quantization_config", None) is not None:
        return False
    return all(it.device.type != "meta" and it.element_size() > 1 for it in model.parameters())


@contextmanager
def float32_weights(model: Any) -> Iterator[None]:
    """Each module's own 16-bit weights are float32 while it computes."""
    narrow: dict[Any, Any] = {}

    def widen(module: Any, _: Any) -> None:
        for weight in module.parameters(recurse=False):
            if weight.is_floating_point() and weight.element_size() < 4:
                narrow[weight] = weight.data
                weight.data = weight.data.float()

    def restore(module: Any, *_: Any) -> None:
        for weight in module.parameters(recurse=False):
            if weight in narrow:
                weight.data = narrow.pop(weight)

    handles = [
        handle
        for module in model.modules()
        for handle in (module.register_forward_pre_hook(widen), module.register_forward_hook(restore))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, data in narrow.items():
            weight.data = data
