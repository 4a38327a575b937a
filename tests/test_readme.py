"""README and site are true: their commands, code, paths and links exist, and each example is a valid configuration."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

import coldstill
from coldstill.cli.main import app
from coldstill.common.config_file import check_config, load_config
from coldstill.pipeline.config import CaptureConfig
from coldstill.rounds.config import RoundsConfig
from coldstill.trainer.config import TrainConfig

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, *sorted((REPOSITORY / "storage_schema").rglob("*.md"))]
FOR_EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
OF_ACCELERATE = "fsdp.yaml"
EXAMPLES = sorted(path for path in (REPOSITORY / "examples").glob("*.yaml") if path.name != OF_ACCELERATE)
"""Those of `debug/` are tested in test_examples.py."""
MODELS: dict[str, type[BaseModel]] = {"capture": CaptureConfig, "train": TrainConfig, "rounds": RoundsConfig}
FENCE = re.compile(r"^ *(`{3,})(\w*)[^\n]*\n(.*?)^ *\1\s*$", re.MULTILINE | re.DOTALL)
OTHER_COMMANDS = {"cd", "docker", "git", "kubectl", "pip", "sbatch", "sky"}
"""Commands whose arguments may be called coldstill too: an image, a package, a folder, a job."""


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for _, language, body in FENCE.findall(page.read_text()) if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each shell command of a page. In `console` blocks commands follow a `$`."""
    for language, body in ((name, body) for name in ("bash", "sh", "console") for body in blocks(page, name)):
        for line in body.replace("\\\n", " ").splitlines():
            if language == "console" and not line.startswith("$ "):
                continue
            for part in re.split(r"&&|;|\|", line.removeprefix("$ ")):
                if words := shlex.split(part, comments=True):
                    yield words


def make_commands(page: Path) -> list[list[str]]:
    return [words[1:] for words in commands(page) if words[0] == "make"]


def coldstill_commands(page: Path) -> list[list[str]]:
    """The words after `coldstill`: alone, in `.venv/bin`, or after `ray job submit ... --`."""
    found = []
    for words in commands(page):
        names = [position for position, word in enumerate(words) if Path(word).name == "coldstill"]
        if names and words[0] not in OTHER_COMMANDS:
            found.append(words[names[-1] + 1 :])
    return found


def subcommands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def tree_paths() -> list[str]:
    """Paths of the file tree: the first code block below a heading with the word files, tree or layout.

    A line is a path and its description. Deeper lines are indented, with or without a drawn tree.
    """
    section = re.search(r"^#+ [^\n]*\b(?:files?|tree|layout)\b[^\n]*$(.*)", README.read_text(), re.M | re.S | re.I)
    assert section, "the README has no heading for its file tree"
    block = FENCE.search(section[1])
    assert block, "the README's file tree is not a code block"
    paths: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in block[3].splitlines():
        bare = re.sub(r"[│├└─|`]", " ", line)
        if not bare.strip():
            continue
        depth, name = len(bare) - len(bare.lstrip()), bare.split()[0]
        if name in {".", "./", "coldstill/"}:
            continue
        while parents and parents[-1][0] >= depth:
            parents.pop()
        path = (parents[-1][1] if parents else "") + name
        paths.append(path)
        if name.endswith("/"):
            parents.append((depth, path))
    return paths


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@FOR_EACH_PAGE
def test_every_make_target_of_a_page_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    asked = {word for words in make_commands(page) for word in words if "=" not in word and not word.startswith("-")}
    assert asked - targets == set()


def test_the_readme_has_the_two_commands_for_a_bare_clone_and_is_short() -> None:
    assert make_commands(README)[:2] == [["demo"], ["test"]]
    assert len(README.read_text().splitlines()) <= 150


def test_pages_have_commands_and_python_and_settings() -> None:
    assert len([words for page in PAGES for words in coldstill_commands(page)]) > 30
    assert len([body for page in PAGES for body in blocks(page, "python")]) > 5
    assert len([body for page in PAGES for body in blocks(page, "yaml")]) > 10


@FOR_EACH_PAGE
def test_every_coldstill_command_of_a_page_exists_with_its_options(page: Path) -> None:
    known = subcommands()
    for words in coldstill_commands(page):
        name, *rest = words
        if name == "--help":
            continue
        assert name in known, words
        if hasattr(known[name], "commands"):
            known_below = known[name].commands
            assert rest[0] in known_below, words
            known, name = {**known, **known_below}, rest[0]
        options = {option for parameter in known[name].params for option in parameter.opts} | {"--help"}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} - options == set(), words


@FOR_EACH_PAGE
def test_every_configuration_in_a_command_of_a_page_loads_with_its_changes(page: Path) -> None:
    for name, *rest in coldstill_commands(page):
        paths = [word for word in rest if word.startswith("examples/")]
        if name in MODELS and paths:
            changes = [word for word in rest if re.match(r"[a-z_.]+=", word)]
            load_config(str(REPOSITORY / paths[0]), model=MODELS[name], overrides=changes)


@FOR_EACH_PAGE
def test_every_example_in_a_command_of_a_page_exists(page: Path) -> None:
    named = [word for words in commands(page) for word in words if word.startswith("examples/")]
    assert [word for word in named if not (REPOSITORY / word).exists()] == []


@FOR_EACH_PAGE
def test_every_settings_block_of_a_page_is_a_valid_configuration(page: Path) -> None:
    """A block may leave out what the page's text says elsewhere: the output, the dataset, the student."""
    for body in blocks(page, "yaml", "yml"):
        given = yaml.safe_load(body)
        if "compute_environment" in given:
            continue  # accelerate's own file, which test_examples.py compares
        kind = "rounds" if "rounds" in given else "capture" if "source" in given else "train"
        filled = {"output": "out"} | given
        if kind == "train":
            filled = {"student": {"model": "m"}} | filled
            if "ensemble" not in filled.get("data", {}):
                filled = {"dataset": "d"} | filled
        check_config(filled, model=MODELS[kind], where=f"{page.name}:\n{body}")


@FOR_EACH_PAGE
def test_every_python_block_of_a_page_compiles_and_imports_public_names(page: Path) -> None:
    for body in blocks(page, "python", "py"):
        tree = ast.parse(body)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "coldstill":
                assert {alias.name for alias in node.names} <= set(coldstill.__all__), body


@pytest.mark.slow
def test_the_python_of_the_readme_trains_a_student_from_the_tiny_dataset(tmp_path: Path) -> None:
    (body,) = blocks(README, "python")
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    script = body.replace("max_steps=100", "max_steps=3")
    assert script != body
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "train_loss" in done.stdout


def test_every_path_of_the_file_tree_exists() -> None:
    paths = tree_paths()
    assert paths
    for path in paths:
        found = list(REPOSITORY.glob(path.rstrip("/")))
        assert found, path
        assert not path.endswith("/") or found[0].is_dir(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_relative_link_resolves(document: Path) -> None:
    text = FENCE.sub("", document.read_text())
    headings = {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)|\bsrc=\"([^\"]+)\"", text)
    for link in (first or second for first, second in links):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        assert not path or (document.parent / path).exists(), link
        assert path or anchor in headings, link


def test_there_are_examples_of_both_kinds() -> None:
    assert {kind for path in EXAMPLES for kind in MODELS if kind in path.name} == {"capture", "train"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_valid_configuration(path: Path) -> None:
    (kind,) = (kind for kind in MODELS if kind in path.name)
    load_config(str(path), model=MODELS[kind])
