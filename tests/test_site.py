"""The documentation site: complete, true to the code, and independent of the network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import coldstill
from coldstill.common.config_file import described_keys
from coldstill.common.errors import ColdstillError
from docs.hooks import configuration, troubleshooting

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
ERRORS = troubleshooting.error_classes()


class _Settings(yaml.SafeLoader):
    """Reads mkdocs.yml without running what its Python tags name."""


_Settings.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def settings() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load((REPOSITORY / "mkdocs.yml").read_text(), Loader=_Settings)
    return loaded


def pages_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [page for one in inner for page in pages_of(one)]


def test_the_menu_lists_every_page_once() -> None:
    assert sorted(pages_of(settings()["nav"])) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_site_takes_no_font_and_no_script_from_elsewhere() -> None:
    given = settings()
    assert given["theme"]["font"] is False
    assert {"search", "offline"} <= {name for name in given["plugins"] if isinstance(name, str)}
    local = [*given["extra_css"], *given["extra"]["polyfills"]]
    assert [path for path in local if not (DOCS / path).is_file()] == []
    # With `repo_url` the theme's script asks the repository's server for figures on every page.
    assert "repo_url" not in given


def test_error_classes_of_all_parts_are_found() -> None:
    assert {error.__module__.split(".")[1] for error in ERRORS} == set(troubleshooting.ROOMS)
    assert len(ERRORS) > 100


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{error.__module__.split('.')[1]}.{error.__name__}")
def test_every_named_error_states_its_cause_and_its_cure(error: type[ColdstillError]) -> None:
    cause, cure = troubleshooting.cause_and_cure(error)
    assert cause.endswith("."), f"the docstring of {error.__name__} should say in a sentence what failed"
    assert cure.endswith("."), f"{error.__name__} needs `usual_fix`, or a paragraph `Fix: ...` in its docstring"


def test_the_page_of_errors_has_each_of_them() -> None:
    titles = re.findall(r"^### (\w+)$", troubleshooting.markdown(), re.MULTILINE)
    assert sorted(titles) == sorted(error.__name__ for error in ERRORS)


def test_the_text_of_an_error_is_no_markup() -> None:
    assert troubleshooting.escaped("a < b, `c < d`, *e_f*") == r"a &lt; b, `c < d`, \*e\_f\*"


@pytest.mark.parametrize("command", configuration.COMMANDS)
def test_the_page_of_settings_has_every_key_with_its_values(command: str) -> None:
    text = configuration.markdown()
    model = configuration.COMMANDS[command]
    for key, _, meaning in described_keys(model):
        section, _, name = key.rpartition(".")
        owner = configuration.SHARED.get(command, {}).get(section.partition(".")[0], command)
        title = f"### {owner}: {section or 'the file itself'}\n"
        assert title in text, key
        table = text.split(title)[1].split("\n### ")[0]
        assert f"\n| `{name}` | " in table, key
        if owner == command:
            assert configuration.cell(meaning) in table, key
        assert configuration.value_of(model, key) not in {"", "any"}, key


def test_sections_that_a_command_shares_have_the_same_keys() -> None:
    for command, shared in configuration.SHARED.items():
        for section, owner in shared.items():
            of_both = [
                [key for key, *_ in described_keys(configuration.COMMANDS[one]) if key.startswith(f"{section}.")]
                for one in (command, owner)
            ]
            assert of_both[0] == of_both[1], section


def test_the_page_of_python_has_every_public_name() -> None:
    text = (DOCS / "api.md").read_text()
    shown = set(re.findall(r"^::: coldstill\.(\w+)$", text, re.MULTILINE))
    assert shown == set(coldstill.__all__) - {"__version__"}
    assert "`coldstill.__version__`" in text


def test_a_link_that_leaves_the_pages_leads_to_the_repository_or_the_page_that_includes_it() -> None:
    pytest.importorskip("mkdocs")
    from mkdocs.exceptions import PluginError

    from docs.hooks import pages

    def link(text: str, folder: str = "docs") -> str:
        return pages.site_link(text, folder=folder, page="cluster.md")

    pages._included.clear()
    assert link("design.md#the-picture") == "design.md#the-picture"
    assert link("../benchmarks/results/real_pair.png") == "results/real_pair.png"
    assert link("../examples/debug") == "https://github.com/coldstill/coldstill/tree/main/examples/debug"
    assert link("../LICENSE").endswith("/blob/main/LICENSE")
    assert link("docs/design.md", folder="") == "design.md"
    assert link("https://docs.ray.io/") == "https://docs.ray.io/"
    pages._included["SECURITY.md"] = "security.md"
    assert link("../SECURITY.md#scope") == "security.md#scope"
    with pytest.raises(PluginError, match="no_such_file"):
        link("../no_such_file.md")
    named = pages.relink("See [cluster.md](cluster.md) and [it](cluster.md).", folder="docs", page="teachers.md")
    assert named == "See [Capture on a cluster](cluster.md) and [it](cluster.md)."
    block = "```\n[a](b.md)\n```\n"
    assert pages.relink(block, folder="docs", page="cluster.md") == block


@pytest.mark.slow
def test_the_site_builds_strictly_and_its_pages_load_nothing_from_the_network(tmp_path: Path) -> None:
    pytest.importorskip("material")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    built = sorted(site.rglob("*.html"))
    assert len(built) > 30
    for page in built:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?([^\"\s>]+)", text)
        loaded += re.findall(r"<link\b[^>]*\brel=\"?(?:stylesheet|icon|preload)\"?[^>]*\bhref=\"?([^\"\s>]+)", text)
        assert loaded
        assert [url for url in loaded if re.match(r"(?:https?:)?//", url)] == [], page.name
    index = json.loads((site / "search/search_index.json").read_text())
    found = {entry["title"] for entry in index["docs"]}
    assert {"LeaseHeld", "open_dataset", "capture: teacher", "Target position"} <= found
