"""The wheel that a stranger installs: complete, and with the base dependencies alone able to verify a dataset."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("storage_schema", "pipeline", "trainer", "demo")
NOT_IN_BASE = ("torch", "ray", "vllm", "transformers", "tokenizers", "huggingface_hub", "pytest")


def run(command: Sequence[str | Path], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def uv(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """uv with pip's settings, as the Makefile calls it."""
    return run([sys.executable, REPOSITORY / "requirements/uv.py", "cpu", *arguments], cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no `build` folder is left in the repository."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "coldstill"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "coldstill.py", "coldstill_config.py"):
        shutil.copy2(REPOSITORY / name, copy)
    for name in (*PACKAGES, "tests"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = uv("build", "--wheel", "--no-build-isolation", "--out-dir", folder, copy, cwd=folder)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("coldstill-*.whl")
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The programs of a fresh environment that holds the wheel and its base dependencies, in the locked versions."""
    folder = tmp_path_factory.mktemp("base") / "environment"
    assert uv("venv", "--python", sys.executable, folder, cwd=folder.parent).returncode == 0
    install = ["pip", "install", "--python", folder, "--constraint", REPOSITORY / "requirements/cpu.txt", wheel]
    # What the cache holds needs no network.
    done = uv(*install, "--offline", cwd=folder.parent)
    if done.returncode != 0:
        done = uv(*install, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def test_the_wheel_holds_every_source_file_and_the_specification_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(file.relative_to(REPOSITORY)) for name in PACKAGES for file in (REPOSITORY / name).rglob("*.py")}
    page = {f"storage_schema/tools/inspect/page.{ending}" for ending in ("html", "css", "js")}
    wanted = sources | page | {"coldstill.py", "coldstill_config.py", "storage_schema/FORMAT.md"}
    assert wanted - names == set()
    assert {name for name in names if not name.startswith("coldstill-")} - wanted == set()


def test_the_base_has_none_of_the_heavy_libraries(base: Path) -> None:
    code = "import importlib.util, sys; print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    done = run([base / "python", "-c", code, *NOT_IN_BASE], cwd=base)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_base_verifies_a_dataset(base: Path, tiny_dataset: Path) -> None:
    done = run([base / "coldstill", "verify", tiny_dataset], cwd=base)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_base_names_the_error_of_a_folder_that_is_no_dataset(base: Path, tmp_path: Path) -> None:
    done = run([base / "coldstill", "verify", tmp_path], cwd=base)
    assert done.returncode == 1
    assert "DatasetNotFound" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["capture", "train"])
def test_the_base_says_which_extra_a_command_needs(base: Path, command: str) -> None:
    done = run([base / "coldstill", command, "config.yaml"], cwd=base)
    assert done.returncode == 1
    assert "PackagesMissing" in done.stderr
    assert f'pip install "coldstill[{command}]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_the_base_lists_a_captures_keys(base: Path) -> None:
    done = run([base / "coldstill", "capture", "--help"], cwd=base)
    assert done.returncode == 0, done.stderr
    assert "teacher.top_k" in done.stdout
