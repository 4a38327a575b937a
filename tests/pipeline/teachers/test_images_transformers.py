"""Laws of the transformers engine on rows with images, of two families and three expansions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from coldstill.common.attention import attends_ahead
from coldstill.pipeline.config import SamplingConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.teachers.protocol import ScoredSequence, TokenSequence, UnscoredSequence, scored_of
from coldstill.pipeline.teachers.transformers_teacher import TransformersTeacher
from coldstill.storage_schema.header_facts import About
from coldstill.storage_schema.rows import TeacherTargets, span_positions
from tests import vision
from tests.pipeline.teachers.image_rows import CONTEXT, Reference, config, header, medium, row, rows

TOLERANCE = 1e-5  # in log-prob, float32 on both sides
FAMILIES = ("idefics3", "idefics3 in tiles", "llava")


def _model(folder: Path, family: str) -> Path:
    if family == "llava":
        return vision.llava_model(folder, seed=3)
    return vision.idefics3_model(folder, splits=family == "idefics3 in tiles", seed=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: _model(tmp_path_factory.mktemp("teacher") / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def teachers(folders: dict[str, Path]) -> dict[str, TransformersTeacher]:
    return {name: TransformersTeacher(config(at, "transformers"), header(at)) for name, at in folders.items()}


def assert_is_reference(targets: TeacherTargets, sequence: TokenSequence, reference: Reference) -> None:
    """Kept ids, their log-probs, label and tail are those of the dense log-probs."""
    dense = reference.logprobs(sequence)
    labels = sequence.token_ids[span_positions(sequence.target_spans) + 1]
    np.testing.assert_allclose(targets.label_logprob, dense[np.arange(labels.size), labels], atol=TOLERANCE)
    np.testing.assert_allclose(targets.logprobs, np.take_along_axis(dense, targets.ids, 1), atol=TOLERANCE)
    kept = np.exp(np.take_along_axis(dense, targets.ids, 1)).sum(1)
    np.testing.assert_allclose(np.exp(targets.log_tail), 1 - kept, atol=TOLERANCE)
    np.testing.assert_allclose(
        np.sort(targets.logprobs, 1)[:, ::-1], -np.sort(-dense, 1)[:, : targets.top_k], atol=1e-4
    )


@pytest.mark.parametrize("loss", ["assistant", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_the_models_own_for_1_2_and_3_images(
    folders: dict[str, Path], teachers: dict[str, TransformersTeacher], family: str, loss: str
) -> None:
    reference = Reference(folders[family])
    sequences = rows(folders[family], loss=loss)
    assert sorted(len(sequence.media) for sequence in sequences) == [0, 0, 1, 1, 2, 3]
    for result, sequence in zip(teachers[family].score(sequences), sequences, strict=True):
        assert isinstance(result, ScoredSequence)
        assert result.row.media == sequence.media
        assert_is_reference(result.targets, sequence, reference)
        result.row.check(token_count=header(folders[family]).token_count)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_of_an_answer_equals_a_later_score_of_it(
    folders: dict[str, Path], teachers: dict[str, TransformersTeacher], family: str
) -> None:
    folder = folders[family]
    sampling = SamplingConfig(n=2, seed=4, max_tokens=12, temperature=0.9)
    teacher = TransformersTeacher(config(folder, "transformers"), header(folder), sampling)
    prompts = rows(folder, prompts=True)
    results = teacher.score(prompts)
    assert [
        result.sample_id if isinstance(result, UnscoredSequence) else result.sequence.sample_id for result in results
    ] == [f"{prompt.sample_id}#{n}" for prompt in prompts for n in range(2)]
    answers = scored_of(results)
    assert {len(answer.sequence.media) for answer in answers} == {0, 1, 2, 3}
    for sequence, targets in answers:
        again = teachers[family].score([sequence])[0]
        assert isinstance(again, ScoredSequence)
        np.testing.assert_allclose(targets.label_logprob, again.targets.label_logprob, atol=1e-4)
        np.testing.assert_allclose(targets.log_tail, again.targets.log_tail, atol=1e-4)
        np.testing.assert_array_equal(targets.draw_ids, again.targets.draw_ids)  # of stored positions, both times


def test_temperature_0_writes_what_transformers_writes(folders: dict[str, Path]) -> None:
    folder = folders["llava"]
    sampling = SamplingConfig(max_tokens=6, temperature=0)
    teacher = TransformersTeacher(config(folder, "transformers"), header(folder), sampling)
    reference, results = Reference(folder), teacher.score(rows(folder, prompts=True))
    assert any(isinstance(result, ScoredSequence) for result in results)
    for prompt, result in zip(rows(folder, prompts=True), results, strict=True):
        written = reference._model.generate(
            **reference._inputs(prompt.token_ids, prompt), do_sample=False, max_new_tokens=6, pad_token_id=1
        )[0, -6:].tolist()
        if isinstance(result, ScoredSequence):
            answer = result.sequence.token_ids[prompt.token_ids.size :].tolist()
            assert answer == written[: len(answer)]
        else:
            assert result.reason is RejectReason.PLACEHOLDERS_DIFFER


def test_an_answer_that_holds_a_token_of_images_is_rejected(folders: dict[str, Path]) -> None:
    folder = folders["idefics3"]
    teacher = TransformersTeacher(
        config(folder, "transformers"), header(folder), SamplingConfig(n=3, max_tokens=40, temperature=5.0, seed=1)
    )
    found = [result for result in teacher.score(rows(folder, prompts=True)) if isinstance(result, UnscoredSequence)]
    assert found
    assert {result.reason for result in found} == {RejectReason.PLACEHOLDERS_DIFFER}
    assert {result.detail for result in found} == {"an answer that holds a token of images"}


def test_a_swapped_image_gives_other_targets(
    folders: dict[str, Path], teachers: dict[str, TransformersTeacher]
) -> None:
    (sequence,) = (one for one in rows(folders["llava"]) if len(one.media) == 2)
    first, second = sequence.media
    swapped = replace(
        sequence, media=(replace(second, position=first.position), replace(first, position=second.position))
    )
    one, other = scored_of(teachers["llava"].score([sequence, swapped]))
    assert np.abs(one.targets.label_logprob - other.targets.label_logprob).max() > 100 * TOLERANCE


def test_faults_of_a_row_are_named_and_the_others_are_scored(
    folders: dict[str, Path], teachers: dict[str, TransformersTeacher]
) -> None:
    folder = folders["idefics3"]
    sequences = rows(folder)
    good = sequences[2]
    placeholder = int(good.token_ids[good.media[0].position])
    text = good.token_ids.copy()
    text[text == placeholder] = 5
    wide = vision.image_bytes(0)
    differs, faults = RejectReason.PLACEHOLDERS_DIFFER, []
    faults += [(differs, replace(good, media=good.media[:1]))]
    faults += [(differs, replace(good, media=(*good.media, medium(good.token_ids.size - 2, wide))))]
    faults += [(differs, replace(good, media=tuple(replace(m, position=m.position + 1) for m in good.media)))]
    faults += [(differs, replace(good, token_ids=text))]
    faults += [(differs, replace(good, target_spans=np.array([[good.media[1].position - 1, 30]], np.int32)))]
    faults += [(differs, replace(sequences[1], token_ids=np.append(sequences[1].token_ids, np.int32(placeholder))))]
    faults += [(differs, replace(good, media=tuple(replace(m, data=None, path="media/a.png") for m in good.media)))]
    faults += [
        (RejectReason.IMAGE_UNREADABLE, replace(good, media=(medium(good.media[0].position, wide[:60]), good.media[1])))
    ]
    many = "<image>" * 9
    tokenizer = Reference(folder)._processor.tokenizer
    faults += [(RejectReason.TOO_MANY_IMAGES, row(tokenizer, 7, many, "x", [wide] * 9))]
    long = row(tokenizer, 8, "<image>" * 8 + "a" * (CONTEXT - 40), "x", [wide] * 8)
    assert long.token_ids.size < CONTEXT
    faults += [(RejectReason.OVER_LONG, long)]
    results = teachers["idefics3"].score([good, *(fault for _, fault in faults), sequences[1]])
    assert isinstance(results[0], ScoredSequence)
    assert isinstance(results[-1], ScoredSequence)
    for (reason, sequence), result in zip(faults, results[1:-1], strict=True):
        assert isinstance(result, UnscoredSequence)
        assert (result.sample_id, result.reason) == (sequence.sample_id, reason), result
        assert "0x" not in result.detail
        assert str(folder) not in result.detail
    assert results[1:-1] == teachers["idefics3"].score([fault for _, fault in faults])  # equal rows, equal details


def test_an_image_that_the_teachers_processor_refuses_rejects_its_row_alone(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = TransformersTeacher(config(folders["llava"], "transformers"), header(folders["llava"]))
    image_processor = teacher._expander._expander.processor.image_processor  # type: ignore[union-attr]
    original = type(image_processor).preprocess

    def refuses(self: object, images: list, **arguments: object) -> object:  # type: ignore[type-arg]
        if any(image.size == (40, 30) for image in images[0]):
            raise ValueError("an aspect ratio of 40:30 in /tmp/one/machine at 0x7f00aa")
        return original(self, images, **arguments)

    monkeypatch.setattr(type(image_processor), "preprocess", refuses)
    results = teacher.score(rows(folders["llava"]))
    assert [isinstance(result, ScoredSequence) for result in results] == [False, True, True, True, True, True]
    assert isinstance(results[0], UnscoredSequence)
    assert results[0].reason is RejectReason.IMAGE_UNSUPPORTED
    assert results[0].detail == "the teacher's processor refuses the images: an aspect ratio of 40:30 in ... at ..."


@pytest.mark.parametrize("family", ["idefics3", "llava"])
def test_a_bfloat16_teacher_has_a_float32_head(folders: dict[str, Path], family: str) -> None:
    folder = folders[family]
    made = header(folder)
    facts = made.teacher.model_copy(update={"dtype": "bfloat16", "head_dtype": "float32"})
    teacher = TransformersTeacher(
        config(folder, "transformers", dtype="bfloat16"), made.model_copy(update={"teacher": facts})
    )
    scored = scored_of(teacher.score(rows(folder)))
    assert len(scored) == 6
    assert all(one.targets.logprobs.dtype == np.float32 for one in scored)
    distinct = [len(set(entries)) for one in scored for entries in one.targets.logprobs.tolist()]
    assert np.mean(distinct) > 15.9


def test_the_attention_of_a_vision_model_is_checked(teachers: dict[str, TransformersTeacher]) -> None:
    for teacher in teachers.values():
        with torch.no_grad():
            assert not attends_ahead(teacher._model)


def test_a_teacher_whose_images_never_fit_is_named_at_the_start(folders: dict[str, Path]) -> None:
    folder = folders["llava"]
    with pytest.raises(TeacherUnusable, match=r"(?s)over_long: 27 tokens.*max_length"):
        TransformersTeacher(config(folder, "transformers", max_length=20), header(folder, max_length=20))


@pytest.mark.parametrize("family", ["idefics3", "llava"])
def test_a_header_without_a_processor_is_one_of_text(folders: dict[str, Path], family: str) -> None:
    """These classes have no head for text alone; they were no teachers of this engine before."""
    made = header(folders[family]).model_copy(update={"about": About()})
    with pytest.raises(TeacherUnusable, match="AutoModelForCausalLM"):
        TransformersTeacher(config(folders[family], "transformers"), made)


def _tokens_of(tokenizer: Any) -> dict[str, Any]:
    """Of a text model of Gemma's families."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": tokenizer.eos_token_id,
    }


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 32,
    "patch_size": 8,
}


def _paligemma(folder: Path) -> Path:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    image_processor, tokenizer = SiglipImageProcessorPil(size={"height": 32, "width": 32}), vision.vision_tokenizer()
    image_processor.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(image_processor, tokenizer)
    torch.manual_seed(0)
    model_config = transformers.PaliGemmaConfig(
        text_config={**_tokens_of(tokenizer), "model_type": "gemma"},
        vision_config={**_VISION, "projection_dim": 64, "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=64,
        hidden_size=64,
    )
    transformers.PaliGemmaForConditionalGeneration(model_config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _gemma3(folder: Path) -> Path:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = vision.vision_tokenizer()
    names = {"image_token": "<soft>", "boi_token": "<image>", "eoi_token": "<eoi>"}
    tokenizer.add_tokens(list(names.values()), special_tokens=True)
    tokenizer._set_model_specific_special_tokens(names)
    image_processor = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    torch.manual_seed(0)
    model_config = transformers.Gemma3Config(
        text_config=_tokens_of(tokenizer),
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<soft>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<eoi>"),
    )
    transformers.Gemma3ForConditionalGeneration(model_config).save_pretrained(folder)
    transformers.Gemma3Processor(image_processor, tokenizer, image_seq_length=4).save_pretrained(folder)
    return folder


def test_a_family_whose_images_attend_in_both_directions_is_the_reference_too(tmp_path: Path) -> None:
    """Gemma 3: its patches see each other, and its placeholder is another token than they are."""
    folder = _gemma3(tmp_path / "gemma3")
    sequences, reference = rows(folder, loss="all"), Reference(folder)
    teacher = TransformersTeacher(config(folder, "transformers"), header(folder))
    assert len(teacher._images.reserved) > 1  # type: ignore[union-attr]
    for result, sequence in zip(teacher.score(sequences), sequences, strict=True):
        assert isinstance(result, ScoredSequence)
        assert_is_reference(result.targets, sequence, reference)


def test_a_family_that_reads_the_text_after_an_image_as_a_whole_is_refused(tmp_path: Path) -> None:
    """PaliGemma: its targets would be those of a model that has read the answer."""
    folder = _paligemma(tmp_path / "paligemma")
    with pytest.raises(TeacherUnusable, match="PaliGemmaForConditionalGeneration that depend on later tokens"):
        TransformersTeacher(config(folder, "transformers"), header(folder))
