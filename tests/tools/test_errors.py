"""All errors of the tools are in one list."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from coldstill.common.errors import ColdstillError
from coldstill.tools import errors

ROOM = Path(errors.__file__).parent
LISTED = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and kind.__module__ == errors.__name__}


def test_every_error_class_of_the_tools_is_in_the_list() -> None:
    elsewhere = {
        (file.name, node.name)
        for file in ROOM.rglob("*.py")
        if file.name != "errors.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        for base in node.bases
        if (name := ast.unparse(base).rpartition(".")[2]).endswith(("Error", "Exception")) or name in LISTED
    }
    assert elsewhere == set()


@pytest.mark.parametrize("name", sorted(LISTED))
def test_every_listed_error_is_a_coldstill_error_with_its_sentence_and_is_raised(name: str) -> None:
    kind = vars(errors)[name]
    assert issubclass(kind, ColdstillError)
    assert (inspect.getdoc(kind) or "").endswith(".")
    assert any(f"{name}(" in file.read_text() for file in ROOM.rglob("*.py") if file.name != "errors.py") or any(
        f"error={name}" in file.read_text() for file in ROOM.rglob("*.py")
    )
