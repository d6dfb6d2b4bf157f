"""Every notebook runs under papermill, and its source is kept clean."""

import json
from pathlib import Path

import pytest

from rrepa_lab.places import assets

NOTEBOOKS = sorted((assets().parent / "notebooks").glob("*.ipynb"))


@pytest.mark.filterwarnings("ignore")  # jupyter's own: kernels over TCP, platform folders
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_its_quick_setting(path, tmp_path):
    papermill = pytest.importorskip("papermill")
    papermill.execute_notebook(
        path,
        tmp_path / path.name,
        {"out_dir": str(tmp_path)},
        progress_bar=False,
        execution_timeout=120,
        store_widget_state=False,
    )
    assert (tmp_path / path.name).stat().st_size < 2_000_000
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["notebook"] == path.stem
    assert result["round_trip_error"] < 1e-3
    assert result["state_gap"] < 1e-2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_source(path):
    cells = json.loads(Path(path).read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert cells[0]["cell_type"] == "markdown"
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert not any(line.startswith(("def ", "class ")) for cell in code for line in cell["source"])
    (parameters,) = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert all(":" in line and "#" in line for line in parameters["source"]), "typed and commented"


def test_there_are_notebooks():
    assert NOTEBOOKS
