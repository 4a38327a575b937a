"""Laws of objects that a configuration names as `module:name`: found, or an error that states why, and no shadowed
packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coldstill.common.plugins import PluginNotFound, is_plugin, load_plugin


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which no path of Python names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


@pytest.mark.parametrize(("text", "found"), [("a:b", True), ("a.b:c", True), ("vllm", False), ("", False)])
def test_a_colon_makes_a_plugin(text: str, found: bool) -> None:
    assert is_plugin(text) is found


def test_objects_of_installed_modules_are_found() -> None:
    from os.path import join

    assert load_plugin("os.path:join", key="source.adapter") is join


def test_a_module_of_the_current_folder_is_found(folder: Path) -> None:
    (folder / "coldstill_test_plugin.py").write_text("def twice(value):\n    return 2 * value\n")
    assert load_plugin("coldstill_test_plugin:twice", key="source.adapter")(4) == 8


@pytest.mark.parametrize("text", ["module", "module:", ":name", "module:a.b", "module:1", "a:b:c"])
def test_text_of_another_form_is_an_error_that_names_the_key(text: str) -> None:
    with pytest.raises(PluginNotFound, match=r"source\.adapter(.|\n)*module:name"):
        load_plugin(text, key="source.adapter")


def test_a_module_that_is_not_there_is_an_error_with_a_way_out(folder: Path) -> None:
    with pytest.raises(PluginNotFound, match="ModuleNotFoundError") as caught:
        load_plugin("coldstill_no_such_module:name", key="teacher.engine")
    assert "teacher.engine: coldstill_no_such_module:name" in caught.value.what
    assert "coldstill_no_such_module.py" in caught.value.fix


def test_a_module_that_fails_to_import_is_an_error_that_quotes_it(folder: Path) -> None:
    (folder / "coldstill_test_broken.py").write_text("raise RuntimeError('first line\\nsecond')\n")
    with pytest.raises(PluginNotFound, match="RuntimeError: first line") as caught:
        load_plugin("coldstill_test_broken:name", key="teacher.engine")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_name_that_its_module_lacks_is_an_error_that_names_the_file(folder: Path) -> None:
    (folder / "coldstill_test_empty.py").write_text("")
    with pytest.raises(PluginNotFound, match=r"no name in .*coldstill_test_empty\.py"):
        load_plugin("coldstill_test_empty:name", key="teacher.engine")


def test_a_file_of_the_current_folder_replaces_no_other_module(tmp_path: Path) -> None:
    for name in ("json", "colorsys", "numpy", "user_module"):
        (tmp_path / f"{name}.py").write_text("def mark():\n    return 'the current folder'\n")
    program = (
        "from coldstill.common.plugins import load_plugin\n"
        "assert load_plugin('user_module:mark', key='k')() == 'the current folder'\n"
        "import colorsys, json, numpy\n"
        "assert load_plugin('json:loads', key='k') is json.loads\n"
        "for module in (colorsys, json, numpy):\n"
        "    assert not hasattr(module, 'mark'), module.__file__\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, check=True, timeout=120)
