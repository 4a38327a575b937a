"""The README is true: its commands, paths and links exist, and each example is a valid configuration."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from coldstill.cli.main import app
from coldstill.common.config_file import load_config
from coldstill.pipeline.config import CaptureConfig
from coldstill.trainer.config import TrainConfig

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
DOCUMENTS = [
    README,
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *sorted((REPOSITORY / "storage_schema").rglob("*.md")),
]
OF_ACCELERATE = "fsdp.yaml"
EXAMPLES = sorted(path for path in (REPOSITORY / "examples").glob("*.yaml") if path.name != OF_ACCELERATE)
"""Those of `debug/` are tested in test_examples.py."""
MODELS: dict[str, type[BaseModel]] = {"capture": CaptureConfig, "train": TrainConfig}
FENCE = re.compile(r"^(`{3,})(\w*)[^\n]*\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    """The words of each shell command of the README. In `console` blocks commands follow a `$`."""
    for _, language, body in FENCE.findall(README.read_text()):
        if language not in {"bash", "sh", "console"}:
            continue
        for line in body.replace("\\\n", " ").splitlines():
            if language == "console" and not line.startswith("$ "):
                continue
            for part in re.split(r"&&|;|\|", line.removeprefix("$ ")):
                if words := shlex.split(part, comments=True):
                    yield words


def make_commands() -> list[list[str]]:
    return [words[1:] for words in commands() if words[0] == "make"]


def coldstill_commands() -> list[list[str]]:
    """The words after `coldstill`: alone, in `.venv/bin`, or after `ray job submit ... --`."""
    found = []
    for words in commands():
        names = [position for position, word in enumerate(words) if Path(word).name == "coldstill"]
        if names and words[0] not in {"cd", "git"}:
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


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    asked = {word for words in make_commands() for word in words if "=" not in word and not word.startswith("-")}
    assert {"demo", "test"} <= asked
    assert asked - targets == set()


def test_every_coldstill_command_of_the_readme_exists_with_its_options() -> None:
    assert coldstill_commands()
    known = subcommands()
    for words in coldstill_commands():
        name, *rest = words
        if name == "--help":
            continue
        assert name in known, words
        options = {option for parameter in known[name].params for option in parameter.opts} | {"--help"}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} - options == set(), words


def test_every_configuration_in_a_command_of_the_readme_loads_with_its_changes() -> None:
    for name, *rest in coldstill_commands():
        paths = [word for word in rest if word.startswith("examples/")]
        if name in MODELS and paths:
            changes = [word for word in rest if re.match(r"[a-z_.]+=", word)]
            load_config(str(REPOSITORY / paths[0]), model=MODELS[name], overrides=changes)


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
    assert {kind for path in EXAMPLES for kind in MODELS if kind in path.name} == set(MODELS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_valid_configuration(path: Path) -> None:
    (kind,) = (kind for kind in MODELS if kind in path.name)
    load_config(str(path), model=MODELS[kind])
