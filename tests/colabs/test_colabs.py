"""Tests that every notebook runs from top to bottom in a new process, with a tiny model."""

from pathlib import Path

import jax
import nbclient
import nbformat
import pytest

import sam_jax
from sam_jax.model.init import init_variables

COLABS = Path(__file__).parents[2] / "colabs"
NOTEBOOKS = sorted(COLABS.glob("*.ipynb"))


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "sam_tiny"
    model = sam_jax.sam_tiny(decoder_heads=8, position_scale=1.0)  # official files have neither
    sam_jax.save(path, model, jax.jit(lambda: init_variables(model, seed=0))())
    return path


@pytest.mark.colab
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tiny_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(COLABS.parent))  # `train` and `configs` are not installed
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "setup" not in tags(cell)]
    (parameters,) = (cell for cell in notebook.cells if "parameters" in tags(cell))
    parameters.source += f"\nweights = {str(tiny_weights)!r}"
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_ready_to_publish(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "strip the outputs"
    assert "setup" in tags(code[0])
    assert f"colabs/{path.name}" in notebook.cells[0].source, "the badge opens this notebook"
    plain = "\n".join(cell.source for cell in code[1:])
    assert not any(line.startswith(("!", "%")) for line in plain.splitlines())
    assert len(code[-1].source.splitlines()) < 15
    assert "assert " in code[-1].source, "the last cell asserts what the notebook shows"


def tags(cell):
    return cell.metadata.get("tags", [])
