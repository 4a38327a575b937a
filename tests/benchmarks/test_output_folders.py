"""The OUTPUT of a benchmark that resumes belongs to one benchmark of one size: its runs never count for another."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.run_log import claim
from benchmarks.inputs import real_model, real_text
from tests.benchmarks.test_commands import COMMANDS, NAMES, ROOT

RESUMING = [name for name in COMMANDS if "add_folders(" in NAMES[name].read_text()]
WRITERS = {"write_text", "write_bytes", "save_pretrained", "savez"}


class _Claimed(Exception):
    """Ends a benchmark where it claims its folder."""


@pytest.mark.parametrize("name", RESUMING)
def test_a_quick_run_and_a_full_one_never_share_a_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = []

    def claimed(output: Path, **settings: Any) -> None:
        assert not list(output.parent.iterdir()), "work before the claim"
        found.append(settings)
        raise _Claimed

    module = importlib.import_module(name)
    monkeypatch.setattr(module, "claim", claimed)
    monkeypatch.setattr(real_model, "is_installed", lambda: True)
    monkeypatch.setattr(real_text, "has_chats", lambda: True)
    folders = [str(tmp_path / "a")] * (2 if "demo=True" in NAMES[name].read_text() else 1)
    for quick in ("0", "1"):
        monkeypatch.setenv("QUICK", quick)
        with pytest.raises(_Claimed):
            module.main(folders)
    full, of_quick = found
    assert full != of_quick
    assert full["benchmark"] == of_quick["benchmark"] == name.removeprefix("benchmarks.").removesuffix(".__main__")


def test_a_folder_is_kept_for_the_settings_with_which_it_was_begun(tmp_path: Path) -> None:
    for _ in range(2):
        claim(tmp_path / "output", benchmark="draws", rates=(1e-3, 2e-3))
    with pytest.raises(SystemExit, match=r"benchmark: 'draws' there, 'rounds' here\): choose another OUTPUT"):
        claim(tmp_path / "output", benchmark="rounds", rates=(1e-3, 2e-3))
    with pytest.raises(SystemExit, match=r"quick: None there, True here"):
        claim(tmp_path / "output", benchmark="draws", rates=(1e-3, 2e-3), quick=True)


def test_what_a_later_start_keeps_is_written_whole_or_not_at_all() -> None:
    """Else a killed start leaves a part of a file or of a model, and the next one takes it for the whole."""
    files = {ROOT / "inputs", *(NAMES[name] if NAMES[name].parent == ROOT else NAMES[name].parent for name in RESUMING)}
    found = []
    for file in sorted(file for place in files for file in ([place] if place.is_file() else place.glob("*.py"))):
        tree = ast.parse(file.read_text())
        blocks = [block for block in ast.walk(tree) if isinstance(block, ast.With)]
        whole = [block for block in blocks if any("new_f" in ast.unparse(item.context_expr) for item in block.items)]
        kept = {call for block in whole for call in ast.walk(block)}
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in WRITERS:
                found += [] if call in kept else [(file.stem, ast.unparse(call))]
    assert [call for stem, call in found if stem != "real_model"] == [], "which renames its folder itself"
    assert len(found) == 2
