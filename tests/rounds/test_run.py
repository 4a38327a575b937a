"""Laws of rounds: real captures and training runs in child processes, killed at any place and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from coldstill.rounds.config import RoundsConfig
from coldstill.rounds.parts import parts_of, student_folder
from coldstill.rounds.run import LOCK_NAME, PartFailed, RoundsChanged, RoundsRunning, run_rounds
from coldstill.rounds.status import read_rounds_status
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import TokenizerMismatch
from coldstill.storage_schema.header_facts import weights_fingerprint
from tests import making

ROOT = Path(__file__).parents[2]


def settings(folder: Path, *, output: str = "rounds", **changes: Any) -> dict[str, Any]:
    """Two rounds of tiny models on eight prompts, in units of four."""
    if not (folder / "teacher").exists():
        making.chat_model(folder / "teacher", seed=1)
        making.chat_model(folder / "student", seed=2)
        making.write_jsonl(folder / "prompts.jsonl", making.chat_rows(8))
    return {
        "output": str(folder / output),
        "rounds": 2,
        "decay": 0.5,
        "source": {"path": str(folder / "prompts.jsonl")},
        "sampling": {"max_tokens": 6},
        "writer": {"engine": "transformers", "max_length": 128},
        "teacher": {"model": str(folder / "teacher"), "engine": "transformers", "top_k": 8, "max_length": 128},
        "rows_per_unit": 4,
        "cluster": {"cpus_per_worker": 0.5},
        "student": {"model": str(folder / "student")},
        "loss": {"name": "lightning_opd"},
        "training": {"max_steps": 3, "batch_size": 4, "save_steps": 1, "threads": 1, "dataloader_workers": 0},
        **changes,
    }


def start(path: Path, *, ray: bool = False) -> subprocess.Popen[str]:
    """`coldstill rounds` in a process group of its own, as a shell starts it."""
    program = ["coldstill", "rounds"] if ray else ["tests.rounds.driver"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *program, str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the process ended too early: {process.communicate()}")
        time.sleep(0.01)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return out


def write(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


def made(output: Path) -> dict[str, str]:
    """What rounds made: the id of each dataset, and the digest of each student's weights."""
    found = {str(path.parent.relative_to(output)): open_dataset(path.parent).dataset_id for path in manifests(output)}
    weights = sorted(output.glob("round-*/train/student/model.safetensors"))
    return found | {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in weights}


def manifests(output: Path) -> list[Path]:
    return sorted(output.glob("round-*/*/manifest.json"))


def child_of(process: subprocess.Popen[str]) -> psutil.Process | None:
    children = psutil.Process(process.pid).children()
    return children[0] if children else None


def test_one_round_ends_with_a_student_whose_card_names_its_dataset(tmp_path: Path) -> None:
    """And SIGTERM in the first part ends both processes with 143, and a changed configuration is named."""
    document = settings(tmp_path, rounds=1)
    path, output = write(tmp_path / "rounds.yaml", document), Path(document["output"])
    process = start(path)
    wait_for(lambda: (output / "round-00/answers").exists(), process)
    child = child_of(process)
    assert child is not None
    with pytest.raises(RoundsRunning, match=f"process {process.pid} "):
        run_rounds(RoundsConfig.model_validate(document))
    assert read_rounds_status(str(output)).state == "running"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 143
    assert "re-run the same command to resume" in err
    assert not psutil.pid_exists(child.pid)
    assert read_rounds_status(str(output)).state == "stopped"
    for changes, key in (({"sampling": {"max_tokens": 7}}, r"sampling\.max_tokens"), ({"decay": 1.0}, "decay")):
        with pytest.raises(RoundsChanged, match=key):
            run_rounds(RoundsConfig.model_validate({**document, **changes}))

    assert "round-00/train (1 of 1)" in finish(start(path))
    scores = open_dataset(output / "round-00/scores")
    writer = scores.header.about.writer
    assert writer is not None
    assert (writer.name, writer.round, len(scores)) == ("student", 0, 8)
    answers = open_dataset(output / "round-00/answers")
    assert writer.weights_fingerprint == answers.header.teacher.weights_fingerprint
    assert [row.token_ids.tolist() for row in scores.rows()] == [row.token_ids.tolist() for row in answers.rows()]
    assert scores.dataset_id in (student_folder(output, 0) / "README.md").read_text()
    status = read_rounds_status(str(output))
    assert (status.state, status.rounds_done, status.student) == ("finished", 1, str(student_folder(output, 0)))
    # More rounds may be wished for, and fewer than were begun may not.
    more = RoundsConfig.model_validate({**document, "rounds": 3})
    assert [part.is_done for part in parts_of(more)] == [True] * 3 + [False] * 6


@pytest.mark.slow
def test_killed_in_every_part_and_resumed_rounds_end_with_the_same_datasets_and_students(tmp_path: Path) -> None:
    unbroken = settings(tmp_path, output="unbroken")
    finish(start(write(tmp_path / "unbroken.yaml", unbroken)))
    document = settings(tmp_path)
    path, output = write(tmp_path / "rounds.yaml", document), Path(document["output"])
    places: list[tuple[Callable[[], object], str]] = [
        (lambda: [*output.glob("round-00/answers/commits/*")], "driver"),
        (lambda: (output / "round-00/scores/plan.parquet").exists(), "part"),
        (lambda: [*output.glob("round-00/train/checkpoint-1/files.json")], "driver"),
        (lambda: (output / "round-01/answers/manifest.json").exists(), "part"),
        (lambda: [*output.glob("round-01/scores/commits/*")], "driver"),
        (lambda: [*output.glob("round-01/train/checkpoint-2/files.json")], "part"),
    ]
    for reached, victim in places:
        process = start(path)
        wait_for(reached, process)
        child = child_of(process)
        if victim == "driver":
            process.kill()
        elif child is not None:
            child.kill()
        process.communicate(timeout=100)
        assert process.returncode != 0
    finish(start(path))
    assert made(output) == made(tmp_path / "unbroken")
    assert len(made(output)) == 6
    ids = json.loads((output / "round-01/train/train_summary.json").read_text())["dataset_ids"]
    assert ids == [open_dataset(output / f"round-0{number}/scores").dataset_id for number in range(2)]
    card = (student_folder(output, 1) / "README.md").read_text()
    assert all(one in card for one in ids)


@pytest.mark.slow
def test_with_ray_a_killed_driver_ends_its_part_and_the_same_command_resumes(tmp_path: Path) -> None:
    document = settings(tmp_path, rounds=1, loss={"name": "taid"})
    path, output = write(tmp_path / "rounds.yaml", document), Path(document["output"])
    process = start(path, ray=True)
    wait_for(lambda: [*output.glob("round-00/answers/commits/*")], process)
    process.kill()
    process.communicate()
    # At once, while the part may still be ending.
    out = finish(start(path, ray=True))
    assert "round-00/scores (1 of 1)" in out
    assert read_rounds_status(str(output)).state == "finished"


@pytest.mark.slow
def test_the_merged_student_of_a_round_is_the_writer_of_the_next(tmp_path: Path) -> None:
    """With a loss on the student's own rows, which compares the weights of both."""
    document = settings(tmp_path)
    document["student"]["lora"] = {"merge": True, "r": 4}
    finish(start(write(tmp_path / "rounds.yaml", document)))
    output = Path(document["output"])
    written = [open_dataset(output / f"round-0{number}/scores").header.about.writer for number in range(2)]
    folders = [Path(document["student"]["model"]), student_folder(output, 0)]
    prints = [weights_fingerprint(folder) for folder in folders]
    assert prints[0] != prints[1]
    assert [(writer.weights_fingerprint, writer.round) for writer in written if writer] == list(
        zip(prints, (0, 1), strict=True)
    )


def test_a_student_with_another_tokenizer_is_refused_before_it_writes(tmp_path: Path) -> None:
    document = settings(tmp_path)
    making.tiny_llama(tmp_path / "other")
    with pytest.raises(TokenizerMismatch, match="other"):
        run_rounds(RoundsConfig.model_validate({**document, "student": {"model": str(tmp_path / "other")}}))
    assert not (tmp_path / "rounds").exists()


def test_fewer_rounds_than_were_begun_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = settings(tmp_path, rounds=3)
    config = RoundsConfig.model_validate(document)
    monkeypatch.setattr("coldstill.rounds.run._run", lambda part, **_: part.folder.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr("coldstill.rounds.run._summary", lambda _: None)
    run_rounds(config)
    with pytest.raises(RoundsChanged, match=r"set rounds to 3 or more"):
        run_rounds(config.model_copy(update={"rounds": 2}))
    run_rounds(config.model_copy(update={"rounds": 4}))
    assert (tmp_path / "rounds" / LOCK_NAME).exists()


def test_a_part_that_fails_is_named_with_the_command_that_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldstill.rounds.run.PROGRAM", "json.tool")  # a module that takes no such arguments
    config = RoundsConfig.model_validate(settings(tmp_path))
    with pytest.raises(PartFailed, match=r"round-00/answers: coldstill capture \S+answers\.yaml\n.*exit code [12]"):
        run_rounds(config)
    assert read_rounds_status(config.output).state == "stopped"
