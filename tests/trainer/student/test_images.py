"""Which student reads images: the rule, its files, its errors; and a student from scratch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from coldstill import load_logit_dataset
from coldstill.common.processor import ProcessorUnusable
from coldstill.trainer.config import StudentConfig
from coldstill.trainer.data.logit_dataset import LogitDataset
from coldstill.trainer.errors import ImageTokenMismatch, StudentNotFound
from coldstill.trainer.student.images import image_probe, images_of, processor_files
from coldstill.trainer.student.load import load_student
from coldstill.trainer.student.tokenizer import checked_student
from tests import making, vision

IMAGE_OF_ANOTHER = 5


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.llava_model(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def logits(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> LogitDataset:
    rows = vision.vision_rows(llava, [1, 0, 2])
    return load_logit_dataset(vision.vision_dataset(tmp_path_factory.mktemp("d") / "data", [rows], tokenizer=llava))


def gemma3(folder: Path) -> Path:
    """A family that sees images and that transformers also loads as a language model."""
    tokenizer = vision.vision_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    eyes |= {"image_size": 32, "patch_size": 8}
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=eyes, mm_tokens_per_image=4, image_token_index=image
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_student_with_a_processor_reads_images(llava: Path, logits: LogitDataset) -> None:
    for given in (str(llava), StudentConfig(model=str(llava)), AutoModelForImageTextToText.from_pretrained(llava)):
        model, _ = checked_student(given, logits, None)
        assert type(model).__name__ == "LlavaForConditionalGeneration"
        images = images_of(model)
        assert type(images.processor).__name__ == "LlavaProcessor"
        assert images.context == 1024


def test_without_a_processor_a_family_with_a_language_model_is_one(tmp_path: Path, logits: LogitDataset) -> None:
    folder = gemma3(tmp_path)
    model, _ = checked_student(str(folder), logits, None)
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(folder))
    assert images_of(model) is None


def test_without_a_processor_another_family_is_an_error_with_the_way_out(
    tmp_path: Path, llava: Path, logits: LogitDataset
) -> None:
    folder = Path(shutil.copytree(llava, tmp_path / "copy"))
    (folder / "processor_config.json").unlink()
    for given in ({"model": str(folder)}, {"from_scratch": str(folder)}, {"from_scratch": {"model_type": "llava"}}):
        with pytest.raises(StudentNotFound, match="without a processor") as error:
            checked_student(StudentConfig(**given), logits, None)
        assert "save_pretrained(FOLDER)" in error.value.fix
        assert ("from_scratch" in error.value.fix) == ("from_scratch" in given)


def test_a_processor_that_cannot_be_loaded_is_named(tmp_path: Path, llava: Path, logits: LogitDataset) -> None:
    folder = Path(shutil.copytree(llava, tmp_path / "copy"))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    with pytest.raises(ProcessorUnusable):
        checked_student(str(folder), logits, None)


def test_a_processor_given_with_a_model_object_is_used(llava: Path, logits: LogitDataset) -> None:
    model = AutoModelForImageTextToText.from_pretrained(llava)
    processor = AutoProcessor.from_pretrained(llava)
    found, _ = checked_student(model, logits, processor)
    assert images_of(found).processor is processor
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(llava))
    model.config.name_or_path = ""
    assert images_of(model) is None


def test_another_token_for_patches_in_the_configuration_is_named(
    tmp_path: Path, llava: Path, logits: LogitDataset
) -> None:
    folder = Path(shutil.copytree(llava, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    name = next(name for name in ("image_token_id", "image_token_index") if name in config)
    (folder / "config.json").write_text(json.dumps({**config, name: IMAGE_OF_ANOTHER}))
    with pytest.raises(ImageTokenMismatch, match="5 in its configuration"):
        checked_student(str(folder), logits, None)
    # A student from scratch takes the dataset's ids anyway.
    model, _ = checked_student(StudentConfig(from_scratch=str(folder)), logits, None)
    assert model.config.image_token_id == images_of(model).processor.image_token_id != IMAGE_OF_ANOTHER


@pytest.mark.parametrize("make", [vision.idefics3_model, vision.llava_model])
def test_a_student_from_scratch_has_the_folder_s_processor_and_the_dataset_s_tokenizer(
    tmp_path: Path, logits: LogitDataset, make: Any
) -> None:
    folder = make(tmp_path)
    kept = {"config.json", "processor_config.json"}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    torch.manual_seed(1)
    model, _ = checked_student(StudentConfig(from_scratch=str(folder)), logits, None)
    images = images_of(model)
    assert images.processor.tokenizer.get_vocab() == vision.vision_tokenizer().get_vocab()
    batch = next(iter(logits.stream(batch_size=3, seed=0, images=images)))
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **batch["images"])


def test_files_of_other_names_are_not_the_processor_s(tmp_path: Path, llava: Path) -> None:
    folder = Path(shutil.copytree(llava, tmp_path / "copy"))
    (folder / "processing_llava.py").write_text("raise SystemExit")
    (folder / "video_preprocessor_config.json").write_text("{}")
    assert set(processor_files(StudentConfig(model=str(folder)))) == {
        "processor_config.json",
        "video_preprocessor_config.json",
    }
    assert processor_files(StudentConfig(model=str(making.tiny_llama(tmp_path / "text")))) == {}


def test_a_probe_has_an_image_that_changes_its_logits(llava: Path, logits: LogitDataset) -> None:
    model, _ = checked_student(str(llava), logits, None)
    probe = image_probe(images_of(model), model)
    again = image_probe(images_of(model), model)
    assert torch.equal(probe.tokens, again.tokens)
    with torch.no_grad():
        seen = model.eval()(input_ids=probe.tokens[None], **probe.inputs).logits
        other = model(input_ids=probe.tokens[None], pixel_values=probe.inputs["pixel_values"].flip(-1)).logits
    assert (seen[0, -1] - other[0, -1]).abs().max() > 1e-4


def test_text_alone_is_loaded_where_it_is_asked_for(tmp_path: Path, logits: LogitDataset) -> None:
    folder = gemma3(tmp_path)
    as_text = load_student(StudentConfig(model=str(folder)), logits.header)
    as_image = load_student(StudentConfig(model=str(folder)), logits.header, image_token=7)
    assert type(as_image).__name__ == "Gemma3ForConditionalGeneration"
    assert as_text.get_output_embeddings() is not None
