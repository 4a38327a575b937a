"""The vision demo's driver and settings: accepted by both halves, and nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from coldstill.common.config_file import load_config
from coldstill.common.files import read_json, write_json
from coldstill.demo.run import OutputOfAnotherSize, run_demo
from coldstill.demo.settings import LOSSES, train_config
from coldstill.demo.vision.run import run_vision_demo
from coldstill.demo.vision.settings import FULL, QUICK, Layout, capture_config
from coldstill.pipeline.config import CaptureConfig
from coldstill.trainer.config import TrainConfig

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_written_settings_are_accepted_by_both_halves(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "a folder")
    for size in (FULL, QUICK):
        capture = _load(tmp_path, capture_config(layout, size), CaptureConfig)
        assert capture.teacher.top_k == size.top_k
        runs = [_load(tmp_path, train_config(layout, size, loss=loss), TrainConfig) for loss in LOSSES]
        assert [run.loss.name for run in runs] == list(LOSSES)
        assert len({run.model_dump_json(exclude={"loss", "output"}) for run in runs}) == 1


def test_a_new_vision_demo_says_how_long_it_will_take_and_a_refused_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    monkeypatch.setattr("coldstill.demo.vision.run.write_part", stop)
    with pytest.raises(Stopped):
        run_vision_demo(tmp_path, quick=True)
    assert "about 4 minutes" in capsys.readouterr().out
    with pytest.raises(OutputOfAnotherSize):
        run_vision_demo(tmp_path, quick=False)
    assert capsys.readouterr().out == ""


def test_each_demo_refuses_the_output_folder_of_the_other(tmp_path: Path) -> None:
    write_json(Layout(tmp_path).size, QUICK.as_dict())
    with pytest.raises(OutputOfAnotherSize):
        run_demo(tmp_path, quick=True)
    with pytest.raises(OutputOfAnotherSize, match="add --quick"):
        run_vision_demo(tmp_path, quick=False)
    assert read_json(Layout(tmp_path).size) == QUICK.as_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["size.json"]


def test_the_names_in_an_output_folder_stay_so_that_an_older_demo_resumes() -> None:
    layout = Layout(Path("demo"))
    paths = [layout.text, layout.chats("distill"), layout.teacher, layout.student, layout.dataset]
    paths += [layout.measurements, layout.answers, layout.summary, layout.picture]
    assert [path.relative_to("demo").as_posix() for path in paths] == [
        *("chats", "chats/distill.jsonl", "teacher", "student", "dataset"),
        *("measurements.json", "answers.json", "summary.json", "answers.png"),
    ]


def test_the_driver_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "ray", "vllm", "matplotlib", "PIL"}
    program = f"import sys, coldstill.demo.vision.run; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def _load(folder: Path, settings: dict[str, Any], model: Any) -> Any:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_config(str(path), model=model, overrides=())
