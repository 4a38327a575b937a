"""Every command of the benchmarks answers `--help` at once, with what it measures, and refuses unknown arguments."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import command

ROOT = Path(command.__file__).parents[1]
FILES = [file for file in sorted(ROOT.rglob("*.py")) if 'if __name__ == "__main__":' in file.read_text()]
NAMES = {".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file for file in FILES}
STARTED = {
    module for file in ROOT.rglob("*.py") for module in re.findall(r'"-m", "(benchmarks(?:\.\w+)+)"', file.read_text())
}
"""Child processes, which another command starts."""
COMMANDS = sorted(name for name in NAMES if name not in STARTED)
HEAVY = {"torch", "transformers", "vllm", "ray", "pyarrow", "matplotlib", "playwright", "coldstill.pipeline.worker"}


def _ended(name: str, arguments: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(arguments)
    return ended.value.code


def test_the_commands_are_found() -> None:
    assert {"benchmarks.codec.__main__", "benchmarks.draws.bytes", "benchmarks.plots"} <= set(COMMANDS)
    assert len(STARTED) == 3
    assert set(NAMES) >= STARTED
    makefile = (ROOT.parent / "Makefile").read_text()
    made = set(re.findall(r"-m (benchmarks(?:\.\w+)+)", makefile))
    assert {name.removesuffix(".__main__") for name in COMMANDS} >= made


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_command_answers_help_and_refuses_an_unknown_argument(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _ended(name, ["--help"]) == 0
    shown = capsys.readouterr().out
    said = importlib.import_module(name).__doc__
    assert said
    assert said.strip() in shown
    assert shown.startswith(f"usage: python -m {name.removesuffix('.__main__')} ")
    assert _ended(name, ["--no-such-option"]) == 2
    folders = re.findall(r"^  (DEMO|OUTPUT|SIDE|FOLDER|CONFIG\.yaml) ", shown, re.MULTILINE)
    assert _ended(name, [*folders, "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err or name in STARTED


@pytest.mark.parametrize("name", [name for name in COMMANDS if "finish(" in NAMES[name].read_text()])
def test_the_help_of_a_benchmark_names_its_target_its_time_and_its_result(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _ended(name, ["--help"])
    shown = capsys.readouterr().out
    facts = dict(re.findall(r"^(\S+):  +(\S.*)$", shown[shown.index("\nmake:") :], re.MULTILINE))
    assert facts.keys() == {"make", "time", "result", "QUICK=1"}
    (stored,) = re.findall(r'finish\(\s*"(\w+)"', NAMES[name].read_text())
    assert f"benchmarks/results/{stored}_CORES_cores.json" in facts["result"]
    assert "nothing is stored" in facts["QUICK=1"]
    makefile = (ROOT.parent / "Makefile").read_text()
    target = facts["make"].split()[1].rstrip(",")
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe
    assert f"-m {name.removesuffix('.__main__')}" in recipe[1]
    assert set(re.findall(r"\b([A-Z_]+)=", facts["make"])) <= set(re.findall(r"\b[A-Z_]+\b", recipe[1]))


def test_help_loads_no_heavy_library() -> None:
    program = f"""
import importlib, json, sys
found = {{}}
for name in {COMMANDS!r}:
    importlib.import_module(name)
    found[name] = sorted({HEAVY!r} & set(sys.modules))
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {name: modules for name, modules in json.loads(done.stdout).items() if modules} == {}


@pytest.mark.parametrize(("value", "wanted"), [("", False), ("0", False), ("1", True), ("yes", True)])
def test_a_run_is_quick_if_the_variable_is_set_and_not_zero(
    value: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICK", value)
    assert command.is_quick() is wanted
    monkeypatch.delenv("QUICK")
    assert not command.is_quick()
