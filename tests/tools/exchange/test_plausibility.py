"""Log-probs that are not of the full softmax, or of other tokens, are refused; all right ones are imported.

A small teacher with known full distributions is the reference: each mistake is made on its values, in plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import HeaderMismatch
from coldstill.storage_schema.rows import CachedRow
from coldstill.tools.card.card import write_card
from coldstill.tools.derive.merge import merged_header
from coldstill.tools.errors import AlignmentDoubtful, NotFullSoftmax, UnusableRow
from coldstill.tools.exchange.axolotl_import import import_axolotl
from coldstill.tools.exchange.derived_targets import MIN_TAIL, derived_targets
from coldstill.tools.exchange.distillkit_import import import_distillkit
from coldstill.tools.exchange.input_files import rounding_of
from coldstill.tools.exchange.plausibility import MassSample, require_full_softmax, votes_of_all
from coldstill.tools.exchange.settings import AxolotlSettings, DistillKitSettings
from tests import making
from tests.tools.exchange import peers

K = 6
EXACT = {**peers.ALL_EXACT, "k": K, "exact_k": K}


def renormalized(values: np.ndarray) -> np.ndarray:
    """Log-probs scaled so that their probabilities sum to 1."""
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Each value as bfloat16 holds it."""
    return np.array([peers.as_stored(one, "bfloat16") for one in values.ravel()]).reshape(values.shape)


ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda values: values,
    "float32": lambda values: values.astype(np.float32).astype(float),
    "float16": lambda values: values.astype(np.float16).astype(float),
    "bfloat16": bfloat16,
    "5 decimals": lambda values: np.round(values, 5),
    "3 decimals": lambda values: np.round(values, 3),
    "5 digits cut off": lambda values: np.trunc(values * 1e5) / 1e5,
    "float16, then 3 decimals": lambda values: np.round(values.astype(np.float16).astype(float), 3),
}


def written(
    folder: Path, texts: list[peers.Sequence], change: Callable[[np.ndarray], np.ndarray], *, layout: str
) -> Path:
    """The teacher's top K of each position after `change`, which takes the values `[T, K]` of a text."""
    folder.mkdir()
    rows = []
    for text in texts:
        ids = np.argsort(-text.logprobs, axis=1, kind="stable")[:-1, :K]
        values = change(np.take_along_axis(text.logprobs[:-1], ids, axis=1))
        named = ("target_token_ids", "logprobs") if layout == "axolotl" else ("token_ids", "top_values")
        if layout == "distillkit":
            data = [[b for v in one for b in peers.float_bytes(float(v), "float32")] for one in values]
            packed = [list(peers.bit_stream(one.tolist(), 8)) for one in ids]
            rows.append({"input_ids": text.tokens.tolist(), "compressed_logprobs": data, "bytepacked_indices": packed})
        else:
            rows.append({"input_ids": text.tokens.tolist(), named[0]: ids.tolist(), named[1]: values.tolist()})
    if layout == "axolotl":
        return peers.write_jsonl(folder / "in.jsonl", rows)
    if layout == "distillkit":
        return peers.write_distillkit(folder, rows, EXACT, per_file=100)
    pq.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
    return folder


def run(source: Path, output: Path, tokenizer: Path, *, layout: str = "axolotl", **changes: Any) -> Dataset:
    """The import of either tool's layout, quietly."""
    fields = {"tokenizer": tokenizer, "teacher": "peer/teacher", "fidelity": "exact", **changes}
    if layout == "axolotl":
        import_axolotl(source, output, AxolotlSettings.model_validate(fields), progress=False)
    else:
        import_distillkit(source, output, DistillKitSettings.model_validate(fields), progress=False)
    return open_dataset(output)


@pytest.fixture(scope="module")
def texts() -> list[peers.Sequence]:
    """Enough text that the alignment shows."""
    return peers.sequences(12, length=60)


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


# ---- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "layout"),
    [*((offset, "axolotl") for offset in (-4, -3, -2, -1, 0, 2, 3, 4, 5, 9)), (-1, "plain"), (3, "plain")],
)
def test_distributions_of_any_other_token_are_refused(
    offset: int, layout: str, texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    shifted = [peers.Sequence(one.tokens, np.roll(one.logprobs, 1 - offset, axis=0)) for one in texts]
    source = written(tmp_path / "in", shifted, lambda values: values, layout=layout)
    with pytest.raises(AlignmentDoubtful) as caught:
        run(source, tmp_path / "out", wide_tokenizer, layout=layout)
    # Only what was tried on the sample is advised: another `predicts` mends no shift but that of one token.
    assert ("--predicts" in str(caught.value)) == (layout == "axolotl" and offset == 2)
    if offset != 9:
        with pytest.raises(AlignmentDoubtful):
            run(source, tmp_path / "out", wide_tokenizer, layout=layout, assume_aligned=True)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    vocabulary=st.integers(30, 200),
    top_k=st.integers(1, 12),
    offset=st.integers(-4, 5) | st.integers(7, 30),
    length=st.sampled_from([8, 20, 40]),
)
def test_no_other_offset_passes_at_any_size(seed: int, vocabulary: int, top_k: int, offset: int, length: int) -> None:
    rows = []
    for text in peers.sequences(-(-320 // length), seed=seed, vocabulary=vocabulary, length=length + 31):
        # The target at t has the distribution of token t + offset, or of one before the text.
        places = np.arange(length)
        source = (places + offset - 1) % len(text.tokens)
        ids = np.argsort(-text.logprobs[source], axis=1, kind="stable")[:, :top_k]
        targets = derived_targets(
            ids,
            np.take_along_axis(text.logprobs[source], ids, axis=1),
            present=np.ones(ids.shape, bool),
            labels=text.tokens[places + 1],
            token_count=vocabulary,
            top_k=top_k,
        )
        tokens = text.tokens[: length + 1].astype(np.int32)
        spans = np.array([[0, length]], np.int32)
        rows.append(CachedRow(sample_id="a", token_ids=tokens, target_spans=spans, targets=targets))
    assert votes_of_all(rows).is_clear == (offset == 1)


@pytest.mark.parametrize("predicts", [None, "next", "same"])
def test_answers_that_were_cut_and_given_an_end_are_refused_with_every_setting(
    predicts: str | None, texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    rows = []
    for text in texts:
        row = peers.raw_row(text, K, version=2, answer=30)
        row["input_ids"] = [*row["input_ids"], 198, 199]  # <|im_end|> and a line break
        rows.append(row)
    source = peers.write_jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(AlignmentDoubtful) as caught:
        run(source, tmp_path / "out", wide_tokenizer, predicts=predicts)
    assert "--predicts" not in str(caught.value)
    assert "after it was scored" in str(caught.value)


def test_a_setting_that_is_advised_is_one_that_works(
    texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    rows = [peers.prepared_row(one, K, predicts="same") for one in texts]
    for row in rows:
        del row["labels"]
    source = peers.write_jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(AlignmentDoubtful, match="--predicts same"):
        run(source, tmp_path / "out", wide_tokenizer)
    assert len(run(source, tmp_path / "out", wide_tokenizer, predicts="same")) == len(texts)


def test_rows_that_are_shifted_among_right_ones_are_refused_or_rejected(tmp_path: Path, wide_tokenizer: Path) -> None:
    texts = peers.sequences(60, length=90)
    mixed = [
        peers.Sequence(one.tokens, np.roll(one.logprobs, 2, axis=0)) if n % 10 == 9 else one
        for n, one in enumerate(texts)
    ]
    source = written(tmp_path / "in", mixed, lambda values: values, layout="axolotl")
    with pytest.raises(UnusableRow, match=r"in-9: alignment"):
        run(source, tmp_path / "out", wide_tokenizer)
    dataset = run(source, tmp_path / "out", wide_tokenizer, bad_rows="reject")
    assert (len(dataset), dataset.manifest.rejected) == (54, 6)


def test_short_rows_that_are_shifted_among_right_ones_end_the_import(tmp_path: Path, wide_tokenizer: Path) -> None:
    texts = peers.sequences(400, length=24)
    mixed = [
        peers.Sequence(one.tokens, np.roll(one.logprobs, 2, axis=0)) if n % 5 == 4 else one
        for n, one in enumerate(texts)
    ]
    source = written(tmp_path / "in", mixed, lambda values: values, layout="axolotl")
    with pytest.raises(AlignmentDoubtful, match="rows predict token t - 1"):
        run(source, tmp_path / "out", wide_tokenizer, rows_per_unit=50)


def test_answers_of_a_single_token_are_judged_together(tmp_path: Path, wide_tokenizer: Path) -> None:
    texts = peers.sequences(120, length=12)
    rows = [peers.raw_row(one, K, version=2, answer=1) for one in texts]
    source = peers.write_jsonl(tmp_path / "in.jsonl", rows)
    assert len(run(source, tmp_path / "out", wide_tokenizer)) == 120
    ended = [{**row, "input_ids": [*row["input_ids"], 199]} for row in rows]
    with pytest.raises(AlignmentDoubtful):
        run(peers.write_jsonl(tmp_path / "ended.jsonl", ended), tmp_path / "no", wide_tokenizer)


def test_a_text_of_one_repeated_token_shows_nothing_and_is_stated(tmp_path: Path, wide_tokenizer: Path) -> None:
    logits = np.zeros((60, peers.VOCABULARY))
    logits[:, 7] = 5
    text = peers.Sequence(np.full(60, 7), logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    source = written(tmp_path / "in", [text] * 3, lambda values: values, layout="axolotl")
    with pytest.raises(AlignmentDoubtful, match="--assume-aligned"):
        run(source, tmp_path / "out", wide_tokenizer)
    assert len(run(source, tmp_path / "out", wide_tokenizer, assume_aligned=True)) == 3


# ---- other assumptions -----------------------------------------------------------------------------------------------


def mistakes() -> dict[str, tuple[Callable[[np.ndarray], np.ndarray], type[Exception], str]]:
    """Values that are not natural log-probs of the full softmax: the change, and the error with words of it."""
    return {
        "base 2": (lambda values: values / math.log(2), NotFullSoftmax, "powers of 2"),
        "base 10": (lambda values: values / math.log(10), NotFullSoftmax, "base 10"),
        "probabilities": (np.exp, NotFullSoftmax, "natural logarithm of these probabilities"),
        "logits": (lambda values: values + 9, NotFullSoftmax, "normalizer"),
        "logits below their largest": (lambda v: v - v.max(axis=1, keepdims=True), NotFullSoftmax, "normalizer"),
        "logits far below": (lambda values: values - 20, NotFullSoftmax, "less than K"),
        "zeros": (np.zeros_like, NotFullSoftmax, "normalizer"),
        "NaN": (lambda values: np.full_like(values, np.nan), UnusableRow, "NaN"),
    }


@pytest.mark.parametrize("mistake", mistakes())
def test_values_of_another_kind_are_refused_by_name(
    mistake: str, texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    change, error, words = mistakes()[mistake]
    source = written(tmp_path / "in", texts, change, layout="axolotl")
    with pytest.raises(error, match=words):
        run(source, tmp_path / "out", wide_tokenizer)


def test_ids_of_another_tokenizer_are_refused(
    texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    other = [peers.Sequence((one.tokens + 3) % peers.VOCABULARY, one.logprobs) for one in texts]
    source = written(tmp_path / "in", other, lambda values: values, layout="axolotl")
    with pytest.raises(AlignmentDoubtful, match="which tokenizer"):
        run(source, tmp_path / "out", wide_tokenizer)


def test_a_second_bos_and_entries_in_any_order_change_nothing(
    texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    rows = [peers.raw_row(one, K, version=2, answer=59) for one in texts]
    for row in rows:
        row["input_ids"] = [0, *row["input_ids"]]
        row["logprobs"] = [values[::-1] for values in row["logprobs"]]
        row["target_token_ids"] = [ids[::-1] for ids in row["target_token_ids"]]
    dataset = run(peers.write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", wide_tokenizer)
    for text, row in zip(texts, dataset.rows(), strict=True):
        assert row.positions.tolist() == list(range(1, 60))
        assert set(row.targets.ids[5].tolist()) == set(peers.top(text.logprobs[5], K)[0])


def test_the_entry_that_vllm_adds_for_the_real_token_is_not_one_of_the_top_k(
    texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    rows = []
    for text in texts:
        row = peers.raw_row(text, K, version=2, answer=59)
        for t in range(59):
            token = int(text.tokens[t + 1])
            if token not in row["target_token_ids"][t]:
                row["target_token_ids"][t].append(token)
                row["logprobs"][t].append(float(text.logprobs[t, token]))
        rows.append(row)
    dataset = run(peers.write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", wide_tokenizer)
    assert dataset.header.top_k == K
