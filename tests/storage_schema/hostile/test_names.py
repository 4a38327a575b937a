"""A stranger's file name does not decide what is written: only names of the format are taken from a dataset."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import ForeignFile, TokenizerNotFound
from coldstill.storage_schema.manifest import MANIFEST_NAME, is_dataset_file
from coldstill.storage_schema.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILES
from coldstill.storage_schema.verified_files import file_record
from coldstill.tools.derive.merge import merge
from coldstill.tools.derive.split import split
from coldstill.tools.derive.subset import subset
from coldstill.tools.pull import pull
from coldstill.tools.push import push
from coldstill.tools.verify import verify

PLANTED = (
    "tokenizer/model.safetensors",
    "tokenizer/pytorch_model.bin",
    "tokenizer/config.json",
    "tokenizer/generation_config.json",
    "tokenizer/evil.py",
    "tokenizer/Tokenizer.json",
    "tokenizer/tokenizer.json.",
    "tokenizer/a/tokenizer.json",
    "Tokenizer/tokenizer.json",
    "README.md",
    "config.json",
    "some_dataset.py",
    ".gitattributes",
    ".git/hooks/post-checkout",
    "_run/request.json",
    "commits/000000.json",
    "shards/evil.py",
    "shards/a/b.parquet",
    "rejects/x.bin",
    "media/a/evil.py",
    "card/stats.png",
)


def plant(root: Path, *names: str, content: bytes = b"planted") -> Path:
    """Files of these names in a sealed dataset, listed in its manifest with right digests."""
    document: dict[str, Any] = json.loads((root / MANIFEST_NAME).read_bytes())
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        document["files"] = [file for file in document["files"] if file["name"] != name]
        document["files"].append(json.loads(file_record(name, content).model_dump_json()))
    (root / MANIFEST_NAME).write_text(json.dumps(document))
    return root


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", PLANTED)
def test_a_name_that_the_format_does_not_have_is_read_past_named_by_verify_and_never_copied(
    tiny_dataset: Path, tmp_path: Path, name: str
) -> None:
    rows = [row.sample_id for row in open_dataset(tiny_dataset).rows()]
    plant(tiny_dataset, name)
    assert [row.sample_id for row in open_dataset(tiny_dataset).rows()] == rows
    findings = verify(tiny_dataset, progress=False)
    assert [(one.where, one.error) for one in findings] == [(name, "ForeignFile")]
    with pytest.raises(ForeignFile, match="coldstill subset"):
        pull(tiny_dataset, tmp_path / "copy", progress=False)
    assert not (tmp_path / "copy").exists()
    made = subset(tiny_dataset, tmp_path / "subset", progress=False)  # the way out that the message names
    assert name not in {file.name for file in made.manifest.files}
    assert verify(tmp_path / "subset", progress=False) == []
    assert pull(tmp_path / "subset", tmp_path / "copy", progress=False).files


def test_no_tool_that_writes_a_dataset_takes_a_foreign_name(tiny_dataset: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_dataset, tmp_path / "other"))
    plant(tiny_dataset, *PLANTED[:6])
    merge([tiny_dataset, other], tmp_path / "merged", progress=False)
    split(tiny_dataset, tmp_path / "parts", parts={"a": 0.5, "b": 0.5}, progress=False)
    made = [tmp_path / "merged", tmp_path / "parts" / "a", tmp_path / "parts" / "b"]
    for root in made:
        written = files_in(root)
        assert not [name for name in PLANTED[:6] if name in written]
        assert "tokenizer/tokenizer.json" in written
    with pytest.raises(Exception, match="ForeignFile"):
        push(tiny_dataset, str(tmp_path / "pushed"), progress=False)
    assert not (tmp_path / "pushed").exists()


def test_every_name_of_the_tokenizer_list_is_copied(tiny_dataset: Path, tmp_path: Path) -> None:
    harmless = [f"tokenizer/{name}" for name in TOKENIZER_FILES[1:]]
    plant(tiny_dataset, *harmless, content=b"{}")
    assert verify(tiny_dataset, deep=True, progress=False) == []
    pull(tiny_dataset, tmp_path / "copy", progress=False)
    subset(tiny_dataset, tmp_path / "subset", progress=False)
    assert {*harmless} <= files_in(tmp_path / "copy") & files_in(tmp_path / "subset")


def test_no_name_of_the_list_is_one_of_a_model() -> None:
    for name in TOKENIZER_FILES:
        assert not name.endswith((".py", ".bin", ".safetensors", ".pt", ".pkl")), name
        assert name not in ("config.json", "generation_config.json", "adapter_config.json"), name
    assert not is_dataset_file(MANIFEST_NAME)


def test_a_tokenizer_s_settings_name_no_code_that_is_loaded(tiny_dataset: Path, tmp_path: Path) -> None:
    name = f"tokenizer/{TOKENIZER_CONFIG}"
    auto_map = {"AutoTokenizer": ["some-org/evil--evil.Evil", None]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": auto_map}
    plant(tiny_dataset, name, content=json.dumps(settings).encode())
    files = open_dataset(tiny_dataset).tokenizer_files()
    assert "auto_map" not in json.loads(files[TOKENIZER_CONFIG])
    (tmp_path / "student").mkdir()
    for name, data in files.items():
        (tmp_path / "student" / name).write_bytes(data)
    AutoTokenizer.from_pretrained(tmp_path / "student", trust_remote_code=True)  # even then: there is nothing to load


@pytest.mark.parametrize("settings", [b"[]", b"\xff", b"", b"[" * 100_000])
def test_settings_of_a_tokenizer_that_are_no_object_are_named(tiny_dataset: Path, settings: bytes) -> None:
    plant(tiny_dataset, f"tokenizer/{TOKENIZER_CONFIG}", content=settings)
    assert [one.error for one in verify(tiny_dataset, progress=False)] == ["TokenizerNotFound"]
    with pytest.raises(TokenizerNotFound, match="JSON object"):
        open_dataset(tiny_dataset).tokenizer_files()


def test_a_strangers_dataset_replaces_no_file_of_a_student_from_scratch(tiny_dataset: Path, tmp_path: Path) -> None:
    from coldstill.trainer.config import TrainConfig
    from coldstill.trainer.train import train

    plant(tiny_dataset, *PLANTED[:5])
    model = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
    model |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = TrainConfig.model_validate(
        {
            "dataset": str(tiny_dataset),
            "student": {"from_scratch": model},
            "loss": {"name": "cross_entropy"},
            "training": {"batch_size": 4, "max_steps": 1},
            "output": str(tmp_path / "run"),
        }
    )
    train(config)
    student = tmp_path / "run" / "student"
    assert load_file(student / "model.safetensors")
    assert json.loads((student / "config.json").read_bytes())["model_type"] == "llama"
    assert b"planted" not in b"".join(path.read_bytes() for path in student.iterdir())
    assert "evil.py" not in files_in(student)
