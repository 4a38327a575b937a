"""The wheel as a user installs it: one name, complete, and unaffected by the user's own files."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests import making

REPOSITORY = Path(__file__).parent.parent
ROOMS = ("storage_schema", "pipeline", "trainer")
NOT_IN_BASE = ("torch", "ray", "vllm", "transformers", "tokenizers", "huggingface_hub", "pytest")
HOSTILE = ("pipeline", "trainer", "storage_schema", "demo", "tools", "cli", "common", "coldstill_config", "tests")
"""Names that a user's own files may have; some were top-level names of this package once."""


def run(command: Sequence[str | Path], *, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


def uv(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """uv with pip's settings, as the Makefile calls it."""
    return run([sys.executable, REPOSITORY / "requirements/uv.py", "cpu", *arguments], cwd=cwd)


def build(kind: str, source: Path, folder: Path) -> None:
    done = uv("build", kind, "--no-build-isolation", "--out-dir", folder, source, cwd=folder)
    assert done.returncode == 0, done.stderr


def package_files(wheel: Path) -> set[str]:
    """What a wheel puts into site-packages, without its own metadata."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with their links, so that no `build` folder is left in the repository."""
    copy = tmp_path_factory.mktemp("sources") / "a folder"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(REPOSITORY / name, copy)
    for name in (*ROOMS, "coldstill", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(REPOSITORY / name, copy / name, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build("--wheel", checkout, folder)
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


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The programs of an environment with the wheel alone, over the packages of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("full") / "environment"
    assert uv("venv", "--python", sys.executable, folder, cwd=folder.parent).returncode == 0
    done = uv("pip", "install", "--python", folder, "--no-deps", wheel, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    # Of the tests' environment only the folder of packages, not its `.pth` files: its editable coldstill stays out.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


def test_the_wheel_installs_one_name(wheel: Path) -> None:
    assert {name.partition("/")[0] for name in package_files(wheel)} == {"coldstill"}
    top_levels = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("top_level.txt")]
    assert [zipfile.ZipFile(wheel).read(name).decode().split() for name in top_levels] == [["coldstill"]]


def test_the_wheel_holds_every_source_file_and_the_specification_and_no_tests(wheel: Path) -> None:
    package = REPOSITORY / "coldstill"
    folders = [package, *(package / room for room in ROOMS)]  # rglob does not follow links
    sources = {
        f"coldstill/{file.relative_to(package)}"
        for folder in folders
        for file in folder.rglob("*.py")
        if file.is_file()
    }
    page = {f"coldstill/tools/inspect/page.{ending}" for ending in ("html", "css", "js")}
    page |= {f"coldstill/common/{name}.css" for name in ("page", "charts")}
    assert package_files(wheel) == sources | page | {"coldstill/py.typed", "coldstill/storage_schema/FORMAT.md"}


def test_the_source_distribution_holds_files_and_builds_the_same_wheel(
    tmp_path: Path, checkout: Path, wheel: Path
) -> None:
    build("--sdist", checkout, tmp_path)
    (archive,) = tmp_path.glob("coldstill-*.tar.gz")
    with tarfile.open(archive) as tar:
        assert [member.name for member in tar if not (member.isfile() or member.isdir())] == []
        tar.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    build("--wheel", source, tmp_path)
    (again,) = tmp_path.glob("coldstill-*.whl")
    assert package_files(again) == package_files(wheel)


def test_the_base_has_none_of_the_heavy_libraries(base: Path) -> None:
    code = "import importlib.util, sys; print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    done = run([base / "python", "-c", code, *NOT_IN_BASE], cwd=base)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_base_verifies_a_dataset(base: Path, tiny_dataset: Path) -> None:
    done = run([base / "coldstill", "verify", tiny_dataset], cwd=base)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_base_opens_a_dataset_by_the_public_api(base: Path, tiny_dataset: Path) -> None:
    code = "import coldstill, sys; print(len(coldstill.open_dataset(sys.argv[1])), coldstill.__version__)"
    done = run([base / "python", "-c", code, tiny_dataset], cwd=base)
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert done.stdout.split() == ["24", version], done.stderr


def test_the_base_names_the_error_of_a_folder_that_is_no_dataset(base: Path, tmp_path: Path) -> None:
    done = run([base / "coldstill", "verify", tmp_path], cwd=base)
    assert done.returncode == 1
    assert "DatasetNotFound" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["capture", "train"])
def test_the_base_names_the_extra_that_a_command_needs(base: Path, command: str) -> None:
    done = run([base / "coldstill", command, "config.yaml"], cwd=base)
    assert done.returncode == 1
    assert "PackagesMissing" in done.stderr
    assert f'pip install "coldstill[{command}]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_the_base_lists_a_captures_keys(base: Path) -> None:
    done = run([base / "coldstill", "capture", "--help"], cwd=base)
    assert done.returncode == 0, done.stderr
    assert "teacher.top_k" in done.stdout


@pytest.mark.slow
def test_a_capture_and_a_training_run_beside_a_users_files_of_any_name(full: Path, tmp_path: Path) -> None:
    """On real Ray, from a directory whose files would be imported in place of ours if ours were top-level names."""
    for name in HOSTILE:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current directory was imported')\n")
    making.chat_model(tmp_path / "teacher")
    making.write_jsonl(tmp_path / "rows.jsonl", making.chat_rows(12))
    capture = {
        "output": "dataset",
        "source": {"path": "rows.jsonl"},
        "teacher": {"model": "teacher", "engine": "transformers", "top_k": 8, "draws": 4, "max_length": 256},
    }
    (tmp_path / "capture.yaml").write_text(yaml.safe_dump(capture))
    train = {
        "dataset": "dataset",
        "output": "run",
        "student": {"model": "teacher"},
        "training": {"batch_size": 4, "max_steps": 2},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train))
    script = tmp_path / "my_script.py"
    script.write_text(
        "import json, coldstill\n"
        "report = coldstill.evaluate('run/student', 'dataset', batch_size=4)\n"
        "print(json.dumps([coldstill.__file__, coldstill.DistillTrainer.__name__, report.targets]))\n"
    )
    for command in ("capture", "train"):
        done = run([full / "coldstill", command, f"{command}.yaml"], cwd=tmp_path, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stdout + done.stderr
    done = run([full / "python", script], cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    file, name, targets = json.loads(done.stdout.splitlines()[-1])
    assert full.parent in Path(file).parents
    assert name == "DistillTrainer"
    assert targets > 0
