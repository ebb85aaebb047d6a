"""Every notebook runs from top to bottom. What it prints is thrown away: the files stay as they are."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install 'jaxinfer[notebook]'")
nbclient = pytest.importorskip("nbclient", reason="pip install 'jaxinfer[notebook]'")
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert any(cell.get("outputs") for cell in notebook.cells)
