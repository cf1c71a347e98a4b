"""The notebook runs top to bottom, and shows what it says."""

import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbformat, of the extra dev")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient, of the extra dev")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def test_the_notebook_runs_top_to_bottom(tmp_path):
    shutil.copy(NOTEBOOK, tmp_path)
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output["data"] for output in shown if output.output_type in ("display_data", "execute_result")]
    assert any("<video" in entry.get("text/html", "") for entry in data)
    assert sum("image/png" in entry for entry in data) == 2
    printed = "".join(output["text"] for output in shown if output.output_type == "stream" and output["name"] == "stdout")
    assert "48 times fewer numbers" in printed
    assert printed.count("keyframe") == 4
    difference = float(printed.split("largest difference to the whole clip: ")[1].split()[0])
    assert difference < 0.05


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
