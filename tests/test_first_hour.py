"""`examples/first_hour.ipynb` runs from its first cell to its last on a CPU, and is stored without outputs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "first_hour.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_stored_without_outputs_and_runs_as_it_is() -> None:
    for cell in cells("code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
    first = "".join(cells("code")[0]["source"])
    assert "\nREAL = False" in first, "one switch, at the top"
    assert '"coldstill[' in first, "the first cell installs the package by its name"
    assert NOTEBOOK.stat().st_size < 20_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_notebook_runs_and_distillation_comes_closer_to_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    path = os.pathsep.join([str(NOTEBOOK.parent.parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path.rstrip(os.pathsep))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    outputs = notebook.cells[-2].outputs
    shown = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    kls = {name: float(kl) for name, kl in re.findall(r"^(\w+) +KL (\S+)", shown, re.MULTILINE)}
    assert kls["taid"] < kls["cross_entropy"] < kls["before"] * 2
    assert kls["taid"] < kls["before"]
