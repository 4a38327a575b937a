"""CONTRIBUTING, SECURITY, CHANGELOG, CITATION and AGENTS name commands, files and versions that exist."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "AGENTS.md")
SITE = tuple(sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").glob("*.md")))
MAKEFILE = (REPOSITORY / "Makefile").read_text()
METADATA: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = METADATA["project"]


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())


def make_words(text: str) -> list[str]:
    """The words after `make` in code: between backticks, or at the start of a line of a code block."""
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    found = re.findall(r"`make ([^`\n]+)`", text) + re.findall(r"^(?:\$ )?make ([^\n#]+)", blocks, re.MULTILINE)
    return [word for words in found for word in words.split()]


@pytest.mark.parametrize("page", [*PAGES, *SITE])
def test_every_make_target_and_variable_of_a_page_exists(page: str) -> None:
    text = (REPOSITORY / page).read_text().replace("`make bench-...`", "")
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    variables = set(re.findall(r"\b([A-Z_]{4,})\b", MAKEFILE))
    words = make_words(text)
    assert words or page in SITE
    assert {word for word in words if "=" not in word} - targets == set()
    assert {word.partition("=")[0] for word in words if "=" in word} - variables == set()


def test_every_target_of_the_makefile_is_phony_and_has_a_help_line_or_serves_another() -> None:
    declared = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    assert declared
    phony = set(declared[1].replace("\\", " ").split())
    assert set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)) == phony
    helped = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
    assert phony - helped == {"test-engines", "test-capture", "test-trainer", "test-rest"}


def test_every_command_of_a_benchmark_that_is_named_anywhere_is_one() -> None:
    """Stored results name the command that made them, so a command outlives the file that it starts."""
    kinds = {".py", ".md", ".json"}
    folders = ("benchmarks", "coldstill", "docs", "pipeline", "storage_schema", "tests", "trainer")
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*") if path.suffix in kinds]
    texts = [path.read_text() for path in (*files, *(REPOSITORY / page for page in PAGES))]
    named = {name for text in (*texts, MAKEFILE) for name in re.findall(r"-m(?: |\", \")(benchmarks(?:\.\w+)+)", text)}
    assert len(named) > 20
    for name in sorted(named):
        path = REPOSITORY / name.replace(".", "/")
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert 'if __name__ == "__main__":' in file.read_text(), name


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    text = (REPOSITORY / page).read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in link]
    folders = "coldstill|storage_schema|pipeline|trainer|tests|docs|benchmarks|examples|requirements"
    paths = re.findall(rf"`((?:{folders})/[\w./-]*|[A-Z]+\.md|\w+\.ya?ml)`", text)
    named = {path for path in (*links, *paths) if path and path != "FORMAT.md"}
    assert named or page == "CHANGELOG.md"
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []


def test_every_test_file_that_the_security_page_names_exists() -> None:
    names = set(re.findall(r"`(test_\w+\.py)`", (REPOSITORY / "SECURITY.md").read_text()))
    hostile = {path.name for path in (REPOSITORY / "tests/storage_schema/hostile").glob("test_*.py")}
    assert names == hostile


def test_the_pages_name_no_particular_assistant() -> None:
    names = r"\b(claude|codex|copilot|cursor|gemini|chatgpt|gpt)\b"
    for page in PAGES:
        assert not re.search(names, (REPOSITORY / page).read_text(), re.IGNORECASE), page


def test_the_citation_is_a_valid_cff_of_this_version(citation: dict[str, Any]) -> None:
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Homepage"]
    for entry in (citation, *citation["references"]):
        assert {"title", "authors", "type"} <= entry.keys()
        assert entry["authors"]
        for author in entry["authors"]:
            assert author.keys() in ({"name"}, {"family-names", "given-names"})
    for entry in citation["references"]:
        (identifier,) = entry["identifiers"]
        assert entry["url"].rpartition("/")[2] == identifier["value"].removeprefix("arXiv:")


def test_every_paper_of_the_papers_page_is_cited(citation: dict[str, Any]) -> None:
    linked = set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", (REPOSITORY / "docs/papers.md").read_text()))
    cited = {entry["url"].rpartition("/")[2] for entry in citation["references"]}
    assert "2501.16937" in linked
    assert linked - cited == set()
    assert {"2501.16937", "2503.16870"} <= cited


def test_the_changelog_has_an_entry_for_this_version() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    assert f"## [{PROJECT['version']}]" in text or ("## [Unreleased]" in text and PROJECT["version"] in text)


def test_the_pythons_of_the_metadata_the_makefile_and_ci_are_the_same() -> None:
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["all"]["strategy"]["matrix"]["python"] == named
    first, last = (tuple(map(int, version.split("."))) for version in (named[0], named[-1]))
    assert PROJECT["requires-python"] == f">={named[0]},<{last[0]}.{last[1] + 1}"
    assert f"{first} <= sys.version_info[:2] <= {last}" in MAKEFILE
    for page in ("README.md", "CONTRIBUTING.md"):
        assert f"Python {named[0]} to {named[-1]}" in (REPOSITORY / page).read_text()


def codespell(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "codespell_lib", "--toml", "pyproject.toml", "-D", "-", "-D", "docs/words.txt"]
    return subprocess.run([*command, str(folder)], cwd=REPOSITORY, capture_output=True, text=True)


MISSPELLED = ["the colour", "find_guilty_rows", "Whoever reads", "octets", "a licence", "teh"]  # codespell:ignore


@pytest.mark.parametrize("text", MISSPELLED)
def test_the_spelling_check_finds(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.py").write_text(f"# {text}\n")
    assert codespell(tmp_path).returncode != 0


def test_the_spelling_check_leaves_out_what_the_commands_write() -> None:
    """After `make demo`, `make test` is run in the same clone: the demo's output is text of other people."""
    ignored = [line.strip("/") for line in (REPOSITORY / ".gitignore").read_text().split()]
    skipped = [part.strip() for part in METADATA["tool"]["codespell"]["skip"].split(",")]
    written = [name for name in ignored if not name.startswith(".") and name != "__pycache__"]
    defaults = set(re.findall(r"\$\(or \$\((?:DEMO|OUTPUT)\),(\w+)\)", MAKEFILE))
    assert "demo_output" in defaults
    assert defaults - set(written) == set()
    assert [name for name in written if f"./{name}" not in skipped] == []


@pytest.mark.parametrize("text", ["header.licence", 'old="licence"', "`licence`", "ROUGE-L", "a license"])
def test_the_spelling_check_allows(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.py").write_text(f"# {text}\n")
    assert codespell(tmp_path).stdout == ""


@pytest.mark.parametrize("target", ["demo", "demo-vision"])
def test_ci_runs_the_demos_as_on_a_cpu_without_avx512_and_bfloat16(target: str) -> None:
    (demo,) = (line for line in (REPOSITORY / ".ci/run").read_text().splitlines() if f"make {target} " in line)
    assert {"ATEN_CPU_CAPABILITY=avx2", "ONEDNN_MAX_CPU_ISA=AVX2", "QUICK=1"} <= set(demo.split())


def test_ci_runs_the_quick_tests_under_the_conditions_of_another_machine() -> None:
    lines = (REPOSITORY / ".ci/run").read_text().splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith("make test-elsewhere "))
    assert lines[start].endswith(" &")
    assert lines[start + 1] == "elsewhere=$!"
    assert any(line.startswith('wait "$elsewhere" || {') for line in lines[start:])  # its failure is that of the script
    script = (REPOSITORY / ".ci/elsewhere").read_text()
    for condition in ("LANG=C", "TZ=Asia/Kathmandu", "umask 077", "setpriv --reuid=65534", "taskset", "HTTP_PROXY="):
        assert condition in script
