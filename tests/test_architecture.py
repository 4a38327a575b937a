"""Which room may import which, read from the import graph without running anything.

The floors, from the ground up: `common`, `storage_schema`, then `tools`, `pipeline` and `trainer` side by side, then
the command line and the demo. Each heavy library is known by one folder.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

REPOSITORY = Path(__file__).parent.parent
ROOMS = ("common", "storage_schema", "tools", "pipeline", "trainer", "demo", "rounds", "cli")
LINKED = ("storage_schema", "pipeline", "trainer")
ALLOWED = {
    "common": set(),
    "storage_schema": {"common"},
    "tools": {"common", "storage_schema"},
    "pipeline": {"common", "storage_schema"},
    "trainer": {"common", "storage_schema"},
    "demo": {"common", "storage_schema", "tools", "pipeline", "trainer"},
    "rounds": {"common", "storage_schema", "tools", "pipeline", "trainer"},
    "cli": {"common", "storage_schema", "tools", "pipeline", "trainer", "demo", "rounds", "api"},
}
_FILE_NAME = re.compile(r"[\w.-]+\.(?:html|jinja|jsonl?|lock|md|parquet|safetensors|yaml)")
_OF_LIBRARIES = {
    "README.md",
    "adapter_config.json",
    "chat_template.jinja",
    "config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "trainer_state.json",
}


@functools.cache
def graph() -> grimp.ImportGraph:
    """All imports of the package, those inside functions and for type checkers too; libraries by their top name."""
    return grimp.build_graph("coldstill", include_external_packages=True, cache_dir=None)


def importers_of(library: str) -> set[str]:
    return graph().find_modules_that_directly_import(library) if library in graph().modules else set()


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_the_package_shows_every_room() -> None:
    folders = {path.name for path in (REPOSITORY / "coldstill").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(ROOMS)
    for name in LINKED:
        assert (REPOSITORY / "coldstill" / name).resolve() == REPOSITORY / name
        assert not (REPOSITORY / name).is_symlink()


def test_import_graph_tools_see_every_source_file() -> None:
    files = {file for room in ROOMS for file in (REPOSITORY / "coldstill" / room).resolve().rglob("*.py")}
    ours = {name for name in graph().modules if room_of(name) in ROOMS}
    assert len(ours) == len(files)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_floors_below_it(room: str) -> None:
    inside = {f"coldstill.{room}"} | graph().find_descendants(f"coldstill.{room}")
    found = {
        (module, imported)
        for module in inside
        for imported in graph().find_modules_directly_imported_by(module)
        if imported.split(".")[0] == "coldstill" and room_of(imported) not in {room, *ALLOWED[room]}
    }
    assert found == set()


def test_nothing_imports_a_room_by_its_folder_at_the_top_level() -> None:
    """`import trainer` would load a second copy of the room, or a stranger's file of that name."""
    bare = {name: importers_of(name) for name in (*LINKED, "demo", "tools")}
    assert {name: found for name, found in bare.items() if found} == {}
    for file in [*(REPOSITORY / "tests").rglob("*.py"), *(REPOSITORY / "benchmarks").rglob("*.py")]:
        names = {
            name.partition(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        }
        assert names & {*LINKED, "demo", "tools"} == set(), file


@pytest.mark.parametrize("library", ["torch", "ray", "vllm", "transformers"])
def test_the_ground_floors_need_no_heavy_library(library: str) -> None:
    assert {room_of(module) for module in importers_of(library)} & {"common", "storage_schema", "tools"} == set()


def test_each_bar_is_one_that_writes_whole_lines_into_a_log() -> None:
    assert importers_of("tqdm") == {"coldstill.common.progress"}


def test_ray_is_known_by_one_folder_of_capture() -> None:
    found = importers_of("ray")
    assert found
    assert all(module.startswith("coldstill.pipeline.cluster.") for module in found)


def test_vllm_is_known_by_one_folder_of_capture_and_its_insides_by_one_file() -> None:
    found = importers_of("vllm")
    assert found
    assert all(module.startswith("coldstill.pipeline.teachers.vllm.") for module in found)
    inside = {
        str(file.relative_to(REPOSITORY / "pipeline"))
        for file in (REPOSITORY / "pipeline").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom) and not node.level
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        if name.startswith("vllm.")
    }
    assert inside == {"teachers/vllm/tap.py"}


PACKAGES = sorted({name.rpartition(".")[0] for name in graph().modules if name.startswith("coldstill.")})


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_circles_of_files_or_folders(package: str) -> None:
    """Among the files and folders of each folder, with all that lies below a folder counted as the folder's own."""
    assert graph().nominate_cycle_breakers(package) == set()


def test_benchmarks_import_each_other_in_no_circle_and_their_shared_folders_import_none_of_them() -> None:
    """A folder counts as one here, as it does in the rooms of the package."""
    found = grimp.build_graph("benchmarks", cache_dir=None)
    for package in {name.rpartition(".")[0] for name in found.modules if "." in name}:
        assert found.nominate_cycle_breakers(package) == set()
    for room in ("benchmarks.common", "benchmarks.inputs"):
        inside = {room} | found.find_descendants(room)
        imported = {name for module in inside for name in found.find_modules_directly_imported_by(module)}
        assert imported <= inside


def test_the_command_line_loads_no_library_of_a_room_before_a_command_runs() -> None:
    heavy = {"torch", "transformers", "ray", "vllm", "numpy", "pyarrow", "fsspec", "matplotlib"}
    heavy |= {"coldstill.pipeline", "coldstill.trainer", "coldstill.demo"}
    program = f"import sys, coldstill.cli.main; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_name_of_a_file_of_ours_stands_in_one_room() -> None:
    """Written twice, one of them changes alone. Names that other libraries chose are written where they are read."""
    found: dict[str, set[str]] = {}
    for room in ROOMS:
        for path in (REPOSITORY / "coldstill" / room).resolve().rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                value = node.value if isinstance(node, ast.Constant) else None
                if isinstance(value, str) and _FILE_NAME.fullmatch(value):
                    found.setdefault(value, set()).add(room)
    twice = {name: sorted(rooms) for name, rooms in found.items() if len(rooms) > 1 and name not in _OF_LIBRARIES}
    assert twice == {}


def test_text_is_read_as_a_number_only_where_its_digits_are_those_of_ascii() -> None:
    """`"²".isdigit()` is true and `int("²")` raises, for the name of a file as for the answer of a server."""
    lines = [
        line
        for room in ROOMS
        for file in (REPOSITORY / "coldstill" / room).resolve().rglob("*.py")
        for line in file.read_text().splitlines()
        if ".isdigit()" in line
    ]
    assert len(lines) > 3
    assert [line for line in lines if ".isascii() and " not in line] == []


def test_the_slow_references_share_no_code_with_what_they_check() -> None:
    tree = ast.parse((REPOSITORY / "tests" / "reference.py").read_text())
    modules = {
        ("tests." if node.level else "") + (node.module or "")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.partition(".")[0] for name in modules} & {"coldstill", "tests", "benchmarks"} == set()
