"""How `make` sets up a machine: uv gets pip's settings, the locks name no host, an old Python gets a clear error."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parent.parent
LOCKS = ("cpu.txt", "gpu.txt")
TORCH = f"torch-1.0+cpu-cp{sys.version_info.major}{sys.version_info.minor}-linux_x86_64.whl"


@pytest.fixture(scope="module")
def uv() -> ModuleType:
    """`requirements/uv.py`, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("coldstill_uv", REPOSITORY / "requirements/uv.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_settings_for_uv(uv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*uv.UV_NAMES.values(), "UV_INDEX_STRATEGY", "UV_TORCH_BACKEND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def wheels(tmp_path: Path) -> str:
    """A wheel folder with torch's CPU build for this Python."""
    (tmp_path / TORCH).touch()
    return str(tmp_path)


def test_pips_environment_overrides_install_and_install_overrides_global(uv: ModuleType) -> None:
    listing = (
        "global.index-url='a'\ninstall.index-url='b'\n:env:.index-url='c'\nglobal.find-links='d'\nglobal.timeout='9'"
    )
    assert uv.pip_settings(listing) == {"index-url": "c", "find-links": "d"}
    assert uv.pip_settings("install.index-url='b'\nglobal.index-url='a'") == {"index-url": "b"}


def test_uv_gets_pips_indexes_and_folders(uv: ModuleType, wheels: str) -> None:
    settings = {"index-url": "one", "extra-index-url": "\ntwo\nthree", "find-links": f"{wheels} other"}
    environment = uv.uv_environment(settings, device="cpu", torch_version="1.0+cpu")
    assert environment.pop("UV_PYTHON") == sys.executable
    assert environment == {
        "UV_DEFAULT_INDEX": "one",
        "UV_INDEX": "two three",
        "UV_FIND_LINKS": f"{wheels},other",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_the_users_settings_of_uv_take_precedence(uv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "mine")
    assert "UV_DEFAULT_INDEX" not in uv.uv_environment({"index-url": "pips"}, device="gpu", torch_version="1.0+cpu")


@pytest.mark.parametrize(("version", "backend"), [("1.0+cpu", None), ("2.0+cpu", "cpu")])
def test_torch_comes_from_its_own_index_where_no_folder_has_the_wanted_wheel(
    uv: ModuleType, wheels: str, version: str, backend: str | None
) -> None:
    environment = uv.uv_environment({"find-links": wheels}, device="cpu", torch_version=version)
    assert environment.get("UV_TORCH_BACKEND") == backend


def test_a_gpu_never_gets_the_cpu_build_of_torch(uv: ModuleType, wheels: str) -> None:
    environment = uv.uv_environment({"find-links": f"{wheels} other"}, device="gpu", torch_version="1.0+cpu")
    assert environment["UV_FIND_LINKS"] == "other"
    assert "UV_TORCH_BACKEND" not in environment


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_every_package_and_names_neither_host_nor_folder(name: str) -> None:
    lines = (REPOSITORY / "requirements" / name).read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert [line for line in packages if not re.fullmatch(r"[a-z0-9._-]+(\[[a-z,]+\])?==\S+( ; .+)?", line)] == []
    assert [line for line in lines if re.search(r"://|^-|\s/", line)] == []
    assert lines[1].split() == ["#", "make", "lock"]


def test_installed_packages_have_all_requirements_but_images_and_sound() -> None:
    if importlib.util.find_spec("torchvision"):
        allowed = set()
    else:
        overrides = (REPOSITORY / "requirements/overrides.txt").read_text()
        allowed = set(re.findall(r"^(\w+);", overrides, re.MULTILINE))
    done = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "check", "--python", sys.executable], capture_output=True, text=True
    )
    assert set(re.findall(r"requires `([\w.-]+)", done.stderr)) == allowed, done.stderr


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('[ "$1" = -V ] && echo "Python 3.9.2" || exit 1', ["needs Python 3.11 to 3.14", "is Python 3.9.2"]),
        (None, ["No ./my python here", "make PYTHON="]),
    ],
)
def test_a_python_that_is_too_old_or_absent_is_refused_with_a_fix(
    tmp_path: Path, script: str | None, words: list[str]
) -> None:
    folder = tmp_path / "a clone"
    folder.mkdir()
    shutil.copy2(REPOSITORY / "Makefile", folder)
    shutil.copy2(REPOSITORY / "pyproject.toml", folder)
    shutil.copytree(REPOSITORY / "requirements", folder / "requirements")
    if script:
        (folder / "my python").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "my python").chmod(0o755)
    done = subprocess.run(["make", "venv", "PYTHON=./my python"], cwd=folder, capture_output=True, text=True)
    assert done.returncode != 0
    assert [word for word in words if word not in done.stderr] == []
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize(
    ("system", "machine", "from_lock", "without_vllm"),
    [("Linux", "x86_64", True, False), ("Linux", "aarch64", False, False), ("Darwin", "arm64", False, True)],
)
def test_elsewhere_than_on_x86_64_linux_the_lock_only_bounds_versions(
    tmp_path: Path, system: str, machine: str, from_lock: bool, without_vllm: bool
) -> None:
    """The lock holds packages that have wheels for x86-64 only, such as those of Intel."""
    uname = tmp_path / "uname"
    uname.write_text(f'#!/bin/sh\n[ "$1" = -s ] && echo {system} || echo {machine}\n')
    uname.chmod(0o755)
    shutil.copy2(REPOSITORY / "Makefile", tmp_path)
    shutil.copy2(REPOSITORY / "pyproject.toml", tmp_path)
    shutil.copytree(REPOSITORY / "requirements", tmp_path / "requirements")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MAKEFLAGS": ""}
    done = subprocess.run(
        ["make", "--dry-run", "venv", "DEVICE=cpu"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    install = next(line for line in done.stdout.splitlines() if "--compile-bytecode" in line)
    assert ("-r requirements/cpu.txt" in install) == from_lock
    assert ("--extra capture-cpu" in install and "--constraint .venv/bounds.txt" in install) == (not from_lock)
    assert ("overrides_macos.txt" in install) == without_vllm
    assert "--override requirements/overrides.txt" in install
