"""What `import coldstill` offers: these names, each loaded on first use, all of them typed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import coldstill

PUBLIC = {
    "CaptureConfig",
    "ColdstillError",
    "DistillTrainer",
    "TrainConfig",
    "__version__",
    "capture",
    "evaluate",
    "load_logit_dataset",
    "open_dataset",
    "train",
}
HEAVY = {"torch", "transformers", "ray", "vllm", "numpy", "pyarrow"}


def test_the_public_names_are_these() -> None:
    assert set(coldstill.__all__) == PUBLIC
    assert coldstill.__version__ is not None
    for name in PUBLIC - {"__version__"}:
        assert getattr(coldstill, name).__name__ == name


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = coldstill.nothing


def test_type_checkers_see_the_public_names() -> None:
    file = Path(coldstill.__file__)
    (block,) = (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.If))
    typed = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == PUBLIC
    assert (file.parent / "py.typed").exists()


@pytest.mark.parametrize(
    "statement", ["import coldstill", "import coldstill; coldstill.TrainConfig, coldstill.capture"]
)
def test_importing_loads_no_heavy_library(statement: str) -> None:
    program = f"import sys; {statement}; print({HEAVY!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("module", ["coldstill", "coldstill.common.config_file"])
def test_the_front_door_loads_no_room(module: str) -> None:
    rooms = {f"coldstill.{room}" for room in ("pipeline", "trainer", "demo")}
    program = f"import sys, {module}; print({rooms | HEAVY!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_mapping_a_file_and_a_config_are_the_same_settings(tmp_path: Path) -> None:
    from coldstill.api import _checked

    keys = {"dataset": "d", "output": "o", "student": {"model": "m"}}
    file = tmp_path / "train.yaml"
    file.write_text("dataset: d\noutput: o\nstudent: {model: m}\n")
    wanted = coldstill.TrainConfig.model_validate(keys)
    assert [_checked(given, coldstill.TrainConfig) for given in (keys, file, str(file), wanted)] == [wanted] * 4


def test_a_wrong_key_is_named_with_its_place() -> None:
    with pytest.raises(coldstill.ColdstillError, match="nmae"):
        coldstill.train({"dataset": "d", "output": "o", "student": {"model": "m"}, "loss": {"nmae": "taid"}})
