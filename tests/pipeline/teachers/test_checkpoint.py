"""Laws of what is read of a teacher's folder before an engine is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from transformers import AutoTokenizer

from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.teachers.checkpoint import dtype_of, load_tokenizer, way_out
from coldstill.pipeline.teachers.transformers_teacher import load_model
from coldstill.pipeline.teachers.vllm.engine import engine_arguments
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE
from tests import making

TEXT = "Hello world, so it is. 你好"


def _config(folder: Path | str, **changes: object) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": str(folder), "top_k": 4, "max_length": 64, **changes})


def test_a_tokenizer_that_transformers_rebuilds_wrongly_is_loaded_as_its_file_says(tmp_path: Path) -> None:
    folder = making.misnamed_tokenizer(tmp_path / "teacher")
    lossy = AutoTokenizer.from_pretrained(folder)
    assert lossy.decode(lossy(TEXT).input_ids) != TEXT, "transformers does it right: the test proves nothing"
    tokenizer = load_tokenizer(_config(folder))
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("</s>", making.CHAT_TEMPLATE)
    # The dataset's copy says it rightly to everybody.
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert copy.decode(copy(TEXT).input_ids) == TEXT


def test_a_tokenizer_without_a_file_of_its_own_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    folder = making.chat_model(tmp_path)
    (folder / TOKENIZER_FILE).unlink()
    with pytest.raises(TeacherUnusable, match="tokenizer"):
        load_tokenizer(_config(folder))


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_folder_of_an_adapter_is_named_with_the_way_out(tmp_path: Path, is_whole: bool) -> None:
    folder = making.chat_model(tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "my-org/base"}))
    if not is_whole:
        (folder / "config.json").unlink()
    with pytest.raises(
        TeacherUnusable, match=r"(?s)an adapter.*a whole model.*set teacher\.adapter: .*teacher\.model to my-org/base"
    ) as e:
        load_tokenizer(_config(folder))
    assert ("remove adapter_config.json" in str(e.value)) == is_whole


def test_a_folder_without_a_model_is_named_and_no_package_advised(tmp_path: Path) -> None:
    with pytest.raises(TeacherUnusable, match=r"without config\.json") as error:
        load_tokenizer(TeacherConfig(model=str(tmp_path)))
    assert "pip install" not in str(error.value)


def test_a_damaged_adapter_config_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(TeacherUnusable, match="to its base model"):
        load_tokenizer(_config(tmp_path))


@pytest.mark.parametrize(
    "arguments", [{"enable_lora": True}, {"lora_modules": ["a=b"]}, {"max_loras": 2}, {"max_lora_rank": 8}]
)
def test_arguments_for_adapters_are_refused_by_name(tmp_path: Path, arguments: dict[str, object]) -> None:
    (name,) = arguments
    header = making.tiny_header(making.tiny_tokenizer(tmp_path))
    with pytest.raises(TeacherUnusable, match=rf"(?s)engine_args\.{name}.*teacher\.adapter names an adapter"):
        engine_arguments(_config(tmp_path, engine_args=arguments), header)
    engine_arguments(_config(tmp_path, engine_args={name: False}), header)


MESSAGES = {
    "\nLlavaProcessor requires the Torchvision library but it was not found in your environment.\n": "torchvision",
    "This modeling file requires the following packages that were not found in your environment: timm, einops. Run "
    "`pip install timm einops`": "timm einops",
    "No module named 'sentencepiece'": "sentencepiece",
    "No module named 'google.protobuf'": "protobuf",
    "LlamaConverter requires the protobuf library but it was not found in your environment.": "protobuf",
    "You need to have sentencepiece or tiktoken installed to convert a tokenizer.": "sentencepiece tiktoken",
    "Please run `pip install mamba-ssm` first.": "mamba-ssm",
}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(message: str) -> None:
    assert way_out(ImportError(message)) == f"pip install {MESSAGES[message]}, on each node"


def test_code_that_must_be_trusted_is_named_and_other_errors_give_no_advice() -> None:
    assert "trust_remote_code: true" in way_out(ValueError("set the option `trust_remote_code=True` to remove this"))
    assert way_out(ValueError("no file named config.json")) == ""


def test_an_import_error_of_a_model_class_is_an_error_for_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ImportError("\nLlavaImageProcessor requires the Torchvision library but it was not found. Checkout")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    header = making.tiny_header(making.tiny_tokenizer(tmp_path))
    with pytest.raises(TeacherUnusable, match=r"(?s)Torchvision library.*pip install torchvision"):
        load_model(_config(tmp_path, engine="transformers"), header)


@pytest.mark.parametrize(("name", "value"), [("atn_implementation", "eager"), ("dtype", "float32")])
def test_an_argument_that_transformers_does_not_take_is_an_error_for_the_user(
    tmp_path: Path, name: str, value: str
) -> None:
    header = making.tiny_header(making.chat_model(tmp_path))
    with pytest.raises(TeacherUnusable, match=rf"(?s)keyword argument '{name}'.*remove that argument"):
        load_model(_config(tmp_path, engine="transformers", engine_args={name: value}), header)


def test_a_models_own_code_is_run_only_if_the_user_trusts_it(tmp_path: Path) -> None:
    folder = making.chat_model(tmp_path)
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    assert type(load_tokenizer(_config(folder, engine_args={"trust_remote_code": True}))).__name__ == "Own"
    with pytest.raises(TeacherUnusable, match="trust_remote_code: true"):
        load_tokenizer(_config(folder))


def test_a_name_that_nothing_has_is_named_once(tmp_path: Path) -> None:
    """Offline here: a file that is not in the cache is no reason to stop, the missing model is."""
    for name in (tmp_path / "nothing", "my-org/no-such-model"):
        with pytest.raises(TeacherUnusable, match=r"(?s)teacher\.model .*tokenizer.*check teacher\.model"):
            load_tokenizer(_config(name))


@pytest.mark.parametrize("stated", ["float32", "bfloat16", None])
def test_both_engines_load_the_data_type_that_the_header_states(tmp_path: Path, stated: str | None) -> None:
    """Of `auto`, vLLM makes bfloat16 of weights in float32; transformers takes that of files that state none."""
    folder = making.chat_model(tmp_path / "teacher")
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=stated or "bfloat16").save_pretrained(folder)
    document = json.loads((folder / "config.json").read_text())
    document["dtype"] = stated
    (folder / "config.json").write_text(json.dumps(document))
    config = _config(folder)
    dtype = dtype_of(config, transformers.AutoConfig.from_pretrained(folder))
    assert dtype == (stated or "float32")
    header = making.tiny_header(folder)
    header = header.model_copy(update={"teacher": header.teacher.model_copy(update={"dtype": dtype})})
    assert engine_arguments(config, header)["dtype"] == dtype
    assert str(load_model(config, header, device="cpu").dtype) == f"torch.{dtype}"


def test_a_data_type_that_a_vision_model_states_at_the_top_alone_is_that_of_its_weights() -> None:
    text = transformers.LlamaConfig()
    model = SimpleNamespace(dtype="bfloat16", get_text_config=lambda: text)
    assert text.dtype is None
    assert dtype_of(_config("m"), model) == "bfloat16"
