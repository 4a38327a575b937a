"""The demo's estimate: measured in a new process, longer on a slower machine, and one thread where that is faster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coldstill.common.config_file import load_config
from coldstill.demo import settings
from coldstill.demo.run import Stage, run_demo
from coldstill.demo.settings import QUICK, Layout, capture_config
from coldstill.demo.speed import Speed, using_threads
from coldstill.pipeline.config import CaptureConfig

IDLE = Speed(steps_per_s=2.8, start_s=1.3, threads=2, most_threads=2)


def test_the_estimate_encloses_the_runs_that_it_was_fitted_to() -> None:
    shortest, longest = IDLE.expected_s(quick=False)
    assert shortest < 391 < longest, "the stored run"
    shortest, longest = Speed(steps_per_s=1.1, start_s=1.6, threads=1, most_threads=2).expected_s(quick=True)
    assert shortest < 322 < longest, "beside two busy processes"


@pytest.mark.parametrize("quick", [True, False])
def test_a_slower_machine_takes_longer_and_a_quick_demo_less_long(quick: bool) -> None:
    slower = Speed(steps_per_s=0.7, start_s=2.6, threads=2, most_threads=2)
    assert slower.expected_s(quick=quick)[0] > IDLE.expected_s(quick=quick)[1]
    assert IDLE.expected_s(quick=True)[1] < IDLE.expected_s(quick=False)[1]


def test_the_sentence_gives_the_range_and_says_why_one_thread_is_used() -> None:
    assert "about 5 to 10 minutes on this machine (2.8 training steps per second)" in IDLE.sentence(quick=False)
    one = Speed(steps_per_s=1.6, start_s=1.3, threads=1, most_threads=2)
    assert "with one thread, the fastest at this load" in one.sentence(quick=False)
    alone = Speed(steps_per_s=1.6, start_s=1.3, threads=1, most_threads=1)
    assert "thread" not in alone.sentence(quick=False), "no other number was measured"


def test_the_number_of_threads_is_that_of_the_user_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with using_threads(1):
        assert os.environ["OMP_NUM_THREADS"] == "4"
    monkeypatch.delenv("OMP_NUM_THREADS")
    with using_threads(1):
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_new_demo_says_how_long_it_takes_and_names_the_engine_that_replaces_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    found: list[Stage] = []
    monkeypatch.setattr("coldstill.demo.run._run_missing", lambda stages, *_, **__: found.extend(stages))
    monkeypatch.setattr("coldstill.demo.run.speed_of", lambda _: IDLE)
    monkeypatch.setattr("coldstill.demo.run.demo_engine", lambda: "transformers")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    run_demo(tmp_path, quick=True)
    shown = capsys.readouterr().out
    assert "vLLM has no CPU wheel for Darwin on arm64" in shown
    assert "minutes on this machine" in shown
    (heading,) = (stage.heading for stage in found if stage.name == "capture")
    assert heading.endswith("with Ray and transformers")


def test_vllm_has_wheels_for_linux_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for system, machine, has_wheel in (
        ("linux", "x86_64", True),
        ("linux", "aarch64", True),
        ("darwin", "arm64", False),
        ("linux", "riscv64", False),
    ):
        monkeypatch.setattr("sys.platform", system)
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert settings.has_vllm_wheel() == has_wheel


def test_the_capture_config_of_the_other_engine_is_valid(tmp_path: Path) -> None:
    import yaml

    config = tmp_path / "capture.yaml"
    config.write_text(yaml.safe_dump(capture_config(Layout(tmp_path), QUICK, engine="transformers")))
    assert load_config(str(config), model=CaptureConfig).teacher.engine == "transformers"


@pytest.mark.parametrize(
    "program",
    ["raise SystemExit(1)", "print('{')", "print('{\"steps_per_s\": 1}')", "pass", "import time; time.sleep(9)"],
)
def test_a_demo_starts_without_an_estimate_if_the_measurement_fails(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("coldstill.demo.speed.__name__", "broken")
    monkeypatch.setattr("coldstill.demo.speed.MAX_SECONDS", 0.5)
    begun: list[str | None] = []
    monkeypatch.setattr(
        "coldstill.demo.run._run_missing", lambda *_, **__: begun.append(os.environ.get("OMP_NUM_THREADS"))
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run_demo(tmp_path / "demo", quick=True)
    assert begun == ["2"]
    assert "minutes on this machine" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_measurement_takes_two_seconds_of_steps_in_its_own_process() -> None:
    from coldstill.demo.run import _environment
    from coldstill.demo.speed import speed_of

    speed = speed_of(_environment())
    assert speed.steps_per_s > 0
    assert 0 < speed.start_s < 120
    assert 1 <= speed.threads <= (os.cpu_count() or 1)
