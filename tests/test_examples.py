"""The chat templates of `examples/` mark exactly the assistant's turns; the debug configs run, each of them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from coldstill.common.config_file import load_config
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.files import SourceRow
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.rows import span_positions
from coldstill.trainer.losses import LOSSES
from examples.debug.run import configs, in_order
from examples.debug.run import main as debug_main
from tests import making

REPOSITORY = Path(__file__).parents[1]
TEMPLATES = REPOSITORY / "examples" / "chat_templates"
SETTINGS = {
    "capture": "coldstill.pipeline.config:CaptureConfig",
    "train": "coldstill.trainer.config:TrainConfig",
    "rounds": "coldstill.rounds.config:RoundsConfig",
}
"""The class of a debug config by the first word of its name, which is the command."""
SYSTEM = {
    "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen2": "You are a helpful assistant.",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(making.chat_model(tmp_path_factory.mktemp("m")))


@pytest.mark.parametrize("name", sorted(SYSTEM))
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_templates_render_chatml_and_mark_the_assistant(
    tokenizer: PreTrainedTokenizerBase, name: str, system: str | None
) -> None:
    turns = [("user", "hi"), ("assistant", "hello\nyou"), ("user", "and?"), ("assistant", "bye")]
    turns = [("system", system), *turns] if system else turns
    shown = turns if system else [("system", SYSTEM[name]), *turns]
    messages = [{"role": role, "content": content} for role, content in turns]
    source = SourceConfig(path="x.jsonl", chat_template=str(TEMPLATES / f"{name}.jinja"))
    sequence = SequenceMaker(tokenizer, source=source, max_length=2000).make(SourceRow(0, {"messages": messages}))
    assert isinstance(sequence, TokenSequence)
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in shown)
    assert tokenizer.decode(sequence.token_ids) == text
    marked = tokenizer.decode(sequence.token_ids[span_positions(sequence.target_spans) + 1])
    assert marked == "hello\nyou<|im_end|>bye<|im_end|>"


@pytest.mark.parametrize("content", ["and?", [{"type": "text", "text": "and?"}]])
def test_the_template_of_internvl_renders_chatml_with_one_placeholder_for_each_image(
    tokenizer: PreTrainedTokenizerBase, content: object
) -> None:
    images = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [
        {"role": "user", "content": images},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "and a dog"},
    ]
    template = (TEMPLATES / "internvl.jinja").read_text()
    shown = ["<IMG_CONTEXT>\n<IMG_CONTEXT>\nwhat?", "a cat", "and?", "and a dog"]
    roles = ["user", "assistant"] * 2
    turns = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(roles, shown, strict=True)]
    render = tokenizer.apply_chat_template
    assert render(messages, chat_template=template, tokenize=False) == "".join(turns)
    prompt = render(messages[:3], chat_template=template, tokenize=False, add_generation_prompt=True)
    assert prompt == "".join(turns[:3]) + "<|im_start|>assistant\n"
    encoded = render(messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
    marked = [id_ for id_, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "a cat<|im_end|>and a dog<|im_end|>"


def settings_of(name: str) -> Any:
    module, _, model = SETTINGS[name.partition("_")[0]].partition(":")
    return load_config(str(configs()[name]), model=getattr(importlib.import_module(module), model))


@pytest.mark.parametrize("name", configs())
def test_a_debug_config_is_short_and_valid_and_writes_where_its_name_says(name: str) -> None:
    lines = configs()[name].read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 25
    kind, _, rest = name.partition("_")
    folder = "datasets" if kind == "capture" else "runs"
    assert settings_of(name).output == f"debug/{folder}/{rest}"


def test_the_debug_configs_run_after_those_that_write_what_they_read() -> None:
    order = in_order(list(configs()))
    assert sorted(order) == sorted(configs())
    written = {settings_of(name).output: place for place, name in enumerate(order)}
    for place, name in enumerate(order):
        for value in _texts(settings_of(name).model_dump(exclude={"output"})):
            if value.startswith(("debug/datasets/", "debug/runs/")):
                made = [at for output, at in written.items() if value == output or value.startswith(f"{output}/")]
                assert made, f"{name} reads {value}, which no debug config writes"
                assert made[0] < place, f"{name} needs an `# after:` for {value}"


def test_every_loss_has_a_debug_config() -> None:
    named = {settings_of(name).loss.name for name in configs() if name.startswith("train")}
    assert set(LOSSES) - named == set()


def test_every_capture_mode_and_both_engines_have_a_debug_config() -> None:
    found = [settings_of(name) for name in configs() if name.startswith("capture")]
    assert {one.mode for one in found} == set(get_args(CaptureConfig.model_fields["mode"].annotation))
    assert {one.documents for one in found if one.mode == "pretrain"} == {"isolate", "concat"}
    assert {one.teacher.engine for one in found} >= {"transformers", "vllm"}


def test_a_debug_config_that_needs_itself_or_an_unknown_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.debug.run.comes_after", lambda path: ["train_js"])
    with pytest.raises(ValueError, match="train_js comes after itself"):
        in_order(["train_js"])
    with pytest.raises(ValueError, match="nothing does not exist"):
        in_order(["nothing"])


class DebugRuns:
    """The debug configs run in one folder, each once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        self._done: set[str] = set()
        self._python("examples.debug.prepare")

    def run(self, name: str) -> None:
        for needed in in_order([name]):
            if needed not in self._done:
                self._python("coldstill", needed.partition("_")[0], str(configs()[needed]))
                self._done.add(needed)

    def _python(self, *arguments: str) -> None:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self._environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_debug_runner_explains_itself_and_names_an_unknown_config(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, said in ((["--help"], 0, "capture_score"), (["no_such"], 2, "no_such does not exist")):
        with pytest.raises(SystemExit) as ended:
            debug_main(arguments)
        assert ended.value.code == code
        shown = capsys.readouterr()
        assert said in shown.out + shown.err


@pytest.fixture(scope="module")
def debug_runs(tmp_path_factory: pytest.TempPathFactory) -> DebugRuns:
    return DebugRuns(tmp_path_factory.mktemp("debug configs"))


@pytest.mark.slow
@pytest.mark.parametrize("name", in_order(list(configs())))
def test_a_debug_config_runs(debug_runs: DebugRuns, name: str) -> None:
    debug_runs.run(name)
    assert (debug_runs.folder / settings_of(name).output).is_dir()


def _texts(value: Any) -> list[str]:
    """All strings in a value of mappings and lists."""
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for one in inside for text in _texts(one)]
