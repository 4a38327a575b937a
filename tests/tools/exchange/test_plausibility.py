"""Log-probs that are not of the full softmax, or of other tokens, are refused; all right ones are imported.

A small teacher with known full distributions is the reference: each mistake is made on its values, in plain Python.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coldstill.storage_schema.errors import HeaderMismatch
from coldstill.tools.card.card import write_card
from coldstill.tools.derive.merge import merged_header
from coldstill.tools.errors import AlignmentDoubtful, NotFullSoftmax
from coldstill.tools.exchange.derived_targets import MIN_TAIL
from coldstill.tools.exchange.input_files import rounding_of
from coldstill.tools.exchange.plausibility import MassSample, require_full_softmax
from tests import making
from tests.tools.exchange import peers
from tests.tools.exchange.doubtful_captures import ROUNDINGS, K, renormalized, run, written

# ---- mass ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounding", "layout"),
    [
        *((rounding, "axolotl") for rounding in ROUNDINGS),
        ("as it is", "distillkit"),
        ("3 decimals", "distillkit"),
        ("float16", "plain"),
    ],
)
def test_renormalized_values_are_refused_and_full_ones_imported_whatever_their_rounding(
    rounding: str, layout: str, texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    rounded = ROUNDINGS[rounding]
    scaled = written(tmp_path / "scaled", texts, lambda values: rounded(renormalized(values)), layout=layout)
    with pytest.raises(NotFullSoftmax, match="a sum of 1 over the kept ids"):
        run(scaled, tmp_path / "no", wide_tokenizer, layout=layout)
    full = written(tmp_path / "full", texts, rounded, layout=layout)
    assert len(run(full, tmp_path / "out", wide_tokenizer, layout=layout)) == len(texts)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    vocabulary=st.integers(8, 400),
    share=st.floats(0.02, 0.95),
    sharpness=st.floats(0.5, 8),
    rounding=st.sampled_from(sorted(ROUNDINGS)),
)
def test_no_renormalized_values_pass_and_open_ones_always_do(
    seed: int, vocabulary: int, share: float, sharpness: float, rounding: str
) -> None:
    rng = np.random.default_rng(seed)
    top_k = min(max(int(share * vocabulary), 1), vocabulary - 1)
    logits = sharpness * rng.standard_normal((200, vocabulary))
    values = -np.sort(-(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))), axis=1)[:, :top_k]
    tails = 1 - np.exp(values).sum(axis=1)
    scaled, full = MassSample(vocabulary), MassSample(vocabulary)
    scaled.add(ROUNDINGS[rounding](renormalized(values)), None)
    full.add(ROUNDINGS[rounding](values), None)
    with pytest.raises(NotFullSoftmax):
        require_full_softmax(scaled, None, fix="")
    # Eight significant bits are the coarsest rounding: no sum is off by more than its entropy / 128, plus 1e-3.
    entropy = -(np.exp(values) * values).sum(axis=1)
    assume(np.median(tails - 2 * (entropy / 128 + 1e-3)) > 0)
    require_full_softmax(full, None, fix="")


def test_a_few_positions_of_another_kind_decide_nothing(
    texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    def change(values: np.ndarray) -> np.ndarray:
        scaled = np.round(renormalized(values), 5)
        scaled[7] = values[7]
        return scaled

    with pytest.raises(NotFullSoftmax):
        run(written(tmp_path / "in", texts, change, layout="axolotl"), tmp_path / "out", wide_tokenizer)


def sure(count: int) -> list[peers.Sequence]:
    """Texts of a teacher that is so sure that the top K sum to 1 in float32, and mostly even in float64."""
    made = []
    for text in peers.sequences(count, length=60):
        logits = np.random.default_rng(0).standard_normal(text.logprobs.shape)
        logits[np.arange(59), text.tokens[1:]] += 40
        made.append(peers.Sequence(text.tokens, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))))
    return made


def test_what_cannot_be_told_apart_is_refused_unless_it_is_stated_and_the_card_says_so(
    tmp_path: Path, wide_tokenizer: Path
) -> None:
    source = written(tmp_path / "in", sure(12), ROUNDINGS["float32"], layout="axolotl")
    with pytest.raises(NotFullSoftmax, match="cannot be told apart") as caught:
        run(source, tmp_path / "out", wide_tokenizer)
    assert "--normalized-over" in str(caught.value)
    for stated in ("vocabulary", "kept"):
        dataset = run(source, tmp_path / stated, wide_tokenizer, normalized_over=stated)
        assert dataset.header.about.normalized_over == stated
    write_card(tmp_path / "kept", progress=False)
    assert "renormalized over the kept ids, so that their tail is lost" in (tmp_path / "kept" / "README.md").read_text()


def test_stated_renormalization_leaves_no_tail_but_the_least(
    texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    source = written(tmp_path / "in", texts, lambda values: np.round(renormalized(values), 3), layout="axolotl")
    dataset = run(source, tmp_path / "out", wide_tokenizer, normalized_over="kept")
    for text, row in zip(texts, dataset.rows(), strict=True):
        np.testing.assert_allclose(np.exp(row.targets.log_tail), MIN_TAIL, rtol=0.02)
        ids, values = peers.top(text.logprobs[3], K)
        found = dict(zip(row.targets.ids[3].tolist(), row.targets.logprobs[3].tolist(), strict=True))
        np.testing.assert_allclose([found[one] for one in ids], renormalized(np.array(values)), atol=3e-3)
    with pytest.raises(HeaderMismatch):
        run(source, tmp_path / "out", wide_tokenizer, normalized_over="vocabulary")
    full = written(tmp_path / "full", texts, lambda values: np.round(values, 3), layout="axolotl")
    other = run(full, tmp_path / "other", wide_tokenizer)
    with pytest.raises(HeaderMismatch, match="normalized_over"):
        merged_header([dataset, other])
    assert merged_header([dataset, dataset]).about.normalized_over == "kept"


def test_a_statement_that_the_values_contradict_is_refused(
    texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    source = written(tmp_path / "in", texts, ROUNDINGS["5 decimals"], layout="axolotl")
    with pytest.raises(NotFullSoftmax, match="normalized_over"):
        run(source, tmp_path / "out", wide_tokenizer, normalized_over="kept")


def test_a_curve_shows_no_tail_so_that_its_captures_are_stated(
    texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    for name, config in (("new", peers.ARCEE_128), ("old", peers.LEGACY)):
        rows = [peers.distillkit_row(one, config) for one in texts]
        peers.write_distillkit(tmp_path / name, rows, config, per_file=12)
        with pytest.raises(NotFullSoftmax, match="cannot be told apart"):
            run(tmp_path / name, tmp_path / f"no {name}", wide_tokenizer, layout="distillkit")
        stated = run(
            tmp_path / name, tmp_path / f"out {name}", wide_tokenizer, layout="distillkit", normalized_over="vocabulary"
        )
        assert len(stated) == len(texts)


def test_residuals_show_a_tail_and_its_absence(
    texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    config = {
        **peers.ARCEE_128,
        "k": 24,
        "exact_k": 4,
        "residual_bins": [{"scale_dtype": "float16", "element_bits": 12, "num_elements": 20}],
    }
    for name, change in (("full", lambda values: values), ("scaled", renormalized)):
        changed = []
        for text in texts:
            logprobs = text.logprobs.copy()
            ids = np.argsort(-logprobs, axis=1)[:, :24]
            np.put_along_axis(logprobs, ids, change(np.take_along_axis(logprobs, ids, 1)), 1)
            changed.append(peers.distillkit_row(peers.Sequence(text.tokens, logprobs), config))
        peers.write_distillkit(tmp_path / name, changed, config, per_file=12)
    assert len(run(tmp_path / "full", tmp_path / "out", wide_tokenizer, layout="distillkit")) == len(texts)
    with pytest.raises(NotFullSoftmax):
        run(tmp_path / "scaled", tmp_path / "no", wide_tokenizer, layout="distillkit")


def test_all_ids_of_the_vocabulary_need_no_tail() -> None:
    values = np.log(np.random.default_rng(0).dirichlet(np.ones(9), 50))
    sample = MassSample(9)
    sample.add(values, None)
    require_full_softmax(sample, None, fix="")


def test_a_file_that_is_renormalized_from_its_middle_on_ends_the_import(tmp_path: Path, wide_tokenizer: Path) -> None:
    texts = peers.sequences(120, length=40)
    number = iter(range(1000))

    def change(values: np.ndarray) -> np.ndarray:
        return values if next(number) < 90 else np.round(renormalized(values), 5)

    source = written(tmp_path / "in", texts, change, layout="axolotl")
    with pytest.raises(NotFullSoftmax):
        run(source, tmp_path / "out", wide_tokenizer, rows_per_unit=30)


@pytest.mark.parametrize(("rounding", "bound"), [("float16", 2**-9), ("bfloat16", 2**-6), ("5 decimals", 1e-5)])
def test_a_rounding_is_read_from_the_values_themselves(rounding: str, bound: float) -> None:
    values = -np.random.default_rng(0).uniform(2, 4, 1000)
    assert rounding_of(ROUNDINGS[rounding](values)).of(np.array([-3.0]))[0] == pytest.approx(bound)


@pytest.mark.parametrize("change", ["right", "renormalized", "answers with an end"])
def test_what_a_real_model_computes_of_its_own_text_is_imported_and_its_mistakes_are_not(
    change: str, tmp_path: Path, wide_tokenizer: Path
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    folder = making.tiny_llama(tmp_path / "model", vocabulary=peers.VOCABULARY)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight *= 60  # a random model is nearly uniform
        torch.manual_seed(0)
        tokens = torch.randint(0, peers.VOCABULARY, (16, 1))
        for _ in range(39):
            last = model(tokens).logits[:, -1]
            tokens = torch.cat([tokens, torch.multinomial(last.softmax(-1), 1)], dim=1)
        values, ids = model(tokens).logits.log_softmax(-1)[:, :-1].topk(K)
    if change == "renormalized":
        values = values.log_softmax(-1)
    rows = []
    for n in range(16):
        own = tokens[n].tolist() + ([198, 199] if change == "answers with an end" else [])
        rows.append({"input_ids": own, "target_token_ids": ids[n].tolist(), "logprobs": values[n].tolist()})
    source = peers.write_jsonl(tmp_path / "in.jsonl", rows)
    if change == "right":
        assert len(run(source, tmp_path / "out", wide_tokenizer)) == 16
    else:
        with pytest.raises(NotFullSoftmax if change == "renormalized" else AlignmentDoubtful):
            run(source, tmp_path / "out", wide_tokenizer)
