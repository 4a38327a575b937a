"""The demo's driver: it skips finished stages, never takes a killed stage for finished, and names failures."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from coldstill.common.config_file import load_config
from coldstill.common.files import read_json, write_json
from coldstill.demo.run import (
    OutputOfAnotherSize,
    Stage,
    StageFailed,
    background_module,
    bring_back,
    put_away,
    run_demo,
    run_stage,
    run_stages,
)
from coldstill.demo.settings import FULL, LOSSES, QUICK, Layout, capture_config, train_config
from coldstill.pipeline.config import CaptureConfig
from coldstill.trainer.config import TrainConfig

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_teacher_comes_back_after_a_failure_and_after_a_kill(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()

    def fail() -> None:
        with put_away(teacher):
            assert not teacher.exists()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert teacher.exists()
    away = put_away(teacher)
    away.__enter__()
    assert not teacher.exists()
    bring_back(teacher)
    assert teacher.exists()
    bring_back(teacher)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_stage_is_done_when_all_of_its_paths_exist(tmp_path: Path) -> None:
    stage = Stage(name="s", heading="h", makes=(tmp_path / "a", tmp_path / "b"), work=lambda: None)
    (tmp_path / "a").touch()
    assert not stage.done
    (tmp_path / "b").touch()
    assert stage.done


def test_only_a_demo_without_a_finished_stage_is_a_new_one(tmp_path: Path) -> None:
    layout, begun = Layout(tmp_path), []
    stages = [Stage(name="s", heading="h", makes=(tmp_path / "a",), work=(tmp_path / "a").touch)]

    def before_new(_: object) -> nullcontext[None]:
        begun.append(stages[0].done)
        return nullcontext()

    for _ in range(2):
        run_stages(stages, layout, QUICK, quick=True, show=lambda *_, **__: None, before_new=before_new)
    assert begun == [False]


def test_an_output_folder_of_another_size_is_refused_and_unchanged(tmp_path: Path) -> None:
    write_json(Layout(tmp_path).size, QUICK.as_dict())
    with pytest.raises(OutputOfAnotherSize, match="add --quick"):
        run_demo(tmp_path, quick=False)
    assert [path.name for path in tmp_path.iterdir()] == ["size.json"]
    assert read_json(Layout(tmp_path).size) == QUICK.as_dict()


def test_the_error_of_a_failed_command_names_its_stage_and_last_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    program = "import sys; print('printed'); sys.stderr.write('1%\\r2%\\rthe reason\\n'); sys.exit(3)"
    with pytest.raises(StageFailed) as failed:
        run_stage("capture", [sys.executable, "-c", program], log=tmp_path / "logs of it" / "capture.txt")
    message = str(failed.value)
    for part in ("stage capture", sys.executable, "exit code 3", "printed", "the reason"):
        assert part in message
    assert "the reason" in capfd.readouterr().err


def test_a_successful_command_shows_its_progress_and_logs_its_output(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    program = "import sys; print('a table'); sys.stderr.write('50%\\r100%\\n')"
    run_stage("verify", [sys.executable, "-c", program], log=tmp_path / "verify.txt")
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "50%\r100%\n")
    assert "a table" in (tmp_path / "verify.txt").read_text()


def test_what_a_grandchild_writes_late_is_in_the_log_and_in_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("coldstill.demo.run.STDERR_WAIT_S", 0.05)
    log, other = tmp_path / "log.txt", tmp_path / "other.txt"
    run_stage("capture", ["sh", "-c", "(sleep 0.3; echo late >&2) >/dev/null &"], log=log)
    with other.open("wb"):  # takes the number that the log had
        deadline = time.monotonic() + 10
        while "late" not in capfd.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert (log.read_text(), other.read_text()) == ("late\n", "")


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a module `sleeper SECONDS CODE OUTPUT`, which writes its pid, sleeps, and exits with a code."""
    program = "import os, pathlib, sys, time\npathlib.Path(sys.argv[-1], 'pid').write_text(str(os.getpid()))\n"
    program += "print('the reason', flush=True)\ntime.sleep(float(sys.argv[1]))\nsys.exit(int(sys.argv[2]))\n"
    (tmp_path / "sleeper.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_stage_in_the_background_is_waited_for_and_its_failure_named(sleeper: Path) -> None:
    layout = Layout(sleeper)
    with background_module("student", "sleeper", "0.5", "0", layout=layout, quick=False):
        assert not (sleeper / "pid").exists() or _alive(int((sleeper / "pid").read_text()))
    assert not _alive(int((sleeper / "pid").read_text()))
    assert "the reason" in layout.log("student").read_text()
    failing = background_module("student", "sleeper", "0", "3", layout=layout, quick=False)
    with pytest.raises(StageFailed, match=r"(?s)stage student.*exit code 3.*the reason"), failing:
        pass


def test_a_failure_in_the_foreground_ends_the_stage_in_the_background(sleeper: Path) -> None:
    def fail() -> None:
        with background_module("student", "sleeper", "60", "0", layout=Layout(sleeper), quick=False):
            _wait_for(lambda: (sleeper / "pid").exists() and (sleeper / "pid").read_text().isdigit())
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert not _alive(int((sleeper / "pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent was killed")
def test_a_killed_demo_ends_its_stage(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    inner = f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(60)"
    program = (
        "import pathlib, sys; from coldstill.demo.run import run_stage\n"
        f"run_stage('s', [sys.executable, '-c', {inner!r}], log=pathlib.Path({str(tmp_path / 'log.txt')!r}))"
    )
    demo = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY)
    _wait_for(lambda: mark.exists() and mark.read_text().isdigit())
    stage = int(mark.read_text())
    demo.kill()
    demo.wait()
    _wait_for(lambda: not _alive(stage))


def test_the_written_settings_are_accepted_by_both_halves(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "a folder")
    for size in (FULL, QUICK):
        capture = _load(tmp_path, capture_config(layout, size), CaptureConfig)
        assert capture.teacher.top_k == size.top_k
        runs = [_load(tmp_path, train_config(layout, size, loss=loss), TrainConfig) for loss in LOSSES]
        assert [run.loss.name for run in runs] == list(LOSSES)
        assert len({run.model_dump_json(exclude={"loss", "output"}) for run in runs}) == 1


def test_the_names_in_an_output_folder_stay_so_that_an_older_demo_resumes() -> None:
    layout = Layout(Path("demo"))
    paths = [layout.size, layout.text, layout.tokenizer, layout.teacher, layout.student, layout.dataset]
    paths += [layout.capture_config, layout.capture_summary, layout.verified, layout.page, layout.card]
    paths += [layout.measurements, layout.summary, layout.picture, layout.log("capture"), layout.rows("teacher", "raw")]
    paths += [layout.train_config("taid"), layout.run("taid"), layout.teacher_presence("taid")]
    paths += [layout.train_summary("taid")]
    assert [path.relative_to("demo").as_posix() for path in paths] == [
        *("size.json", "text", "tokenizer", "teacher", "student", "dataset"),
        *("configs/capture.yaml", "capture.json", "verified.txt", "row.html", "dataset/README.md"),
        *("measurements.json", "summary.json", "training.png", "logs/capture.txt", "text/teacher.raw.jsonl"),
        *("configs/train_taid.yaml", "runs/taid", "runs/taid.witness.json"),
        "runs/taid/train_summary.json",
    ]


def test_the_driver_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "ray", "vllm", "matplotlib"}
    program = f"import sys, coldstill.demo.run; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def _load(folder: Path, settings: dict, model):
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_config(str(path), model=model, overrides=())


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
