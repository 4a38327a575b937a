"""Who may import whom, read from the sources without running them.

The base layer needs nothing of ours; capture and training never meet; each heavy library is known by one file.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("storage_schema", "pipeline", "trainer", "demo")


def source_files(package: str) -> list[Path]:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files, f"{package} holds no Python file"
    return files


def module_name(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_nodes(node: ast.AST, *, at_start_only: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports below a node; `at_start_only` leaves out those that run when a function is called, or never."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not (
            at_start_only and (isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_type_checking(child))
        ):
            yield from import_nodes(child, at_start_only=at_start_only)


@functools.cache
def imports(file: Path, *, at_start_only: bool = False) -> frozenset[str]:
    """Absolute names of all that a file imports: `from a import b` gives both `a` and `a.b`."""
    found: set[str] = set()
    package = list(file.relative_to(REPOSITORY).parent.parts)
    for node in import_nodes(ast.parse(file.read_text()), at_start_only=at_start_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        origin = ".".join([*base, *([node.module] if node.module else [])])
        found |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return frozenset(found)


def top_level(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(file)}


def files_that_import(package: str, library: str) -> list[str]:
    return [str(file.relative_to(REPOSITORY)) for file in source_files(package) if library in top_level(file)]


@pytest.mark.parametrize(
    "library", ["pipeline", "trainer", "demo", "torch", "ray", "vllm", "transformers", "coldstill"]
)
def test_storage_schema_stands_alone(library: str) -> None:
    assert files_that_import("storage_schema", library) == []


@pytest.mark.parametrize(
    ("package", "other"),
    [("pipeline", "trainer"), ("trainer", "pipeline"), ("pipeline", "demo"), ("trainer", "demo")],
)
def test_the_two_halves_and_the_demo_above_them_do_not_meet(package: str, other: str) -> None:
    assert files_that_import(package, other) == []


def test_ray_is_known_by_one_folder_of_capture() -> None:
    files = files_that_import("pipeline", "ray")
    assert files
    assert all(file.startswith("pipeline/cluster/") for file in files)
    assert files_that_import("trainer", "ray") == []


def test_vllm_is_known_by_one_folder_of_capture_and_its_insides_by_one_file() -> None:
    files = files_that_import("pipeline", "vllm")
    assert files
    assert all(file.startswith("pipeline/teachers/vllm/") for file in files)
    inside = [file.name for file in source_files("pipeline") if any(name.startswith("vllm.") for name in imports(file))]
    assert inside == ["tap.py"]
    assert files_that_import("trainer", "vllm") == []


@pytest.mark.parametrize("module", ["coldstill.py", "coldstill_config.py"])
def test_the_front_door_imports_no_room_before_it_must(module: str) -> None:
    rooms = {"pipeline", "trainer", "demo", "torch", "ray", "vllm", "transformers"}
    assert {name.partition(".")[0] for name in imports(REPOSITORY / module, at_start_only=True)} & rooms == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_circles(package: str) -> None:
    modules = {module_name(file): file for file in source_files(package)}
    graph = {name: (set(imports(file)) & modules.keys()) - {name} for name, file in modules.items()}
    for name, targets in graph.items():
        # `from . import part` inside a package names the package too; only its parts are meant.
        targets -= {target for target in targets if name.startswith(f"{target}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_the_slow_references_share_no_code_with_what_they_check() -> None:
    ours = {*PACKAGES, "coldstill", "coldstill_config", "tests"}
    assert top_level(REPOSITORY / "tests" / "reference.py") & ours == set()
