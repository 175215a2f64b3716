"""Tests that every notebook runs from top to bottom in a new process, and shows its outputs."""

import re

import jax
import nbformat
import pytest

import sam_jax
from sam_jax.model.init import init_variables
from tests.colabs.execution import COLABS, run_notebook, tags

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
    monkeypatch.setenv("PYTHONPATH", "")  # restored afterwards
    run_notebook(path, tmp_path, f"weights, steps = {str(tiny_weights)!r}, 200")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_ready_to_publish(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "setup" in tags(code[0])
    assert f"colabs/{path.name}" in notebook.cells[0].source, "the badge opens this notebook"
    plain = "\n".join(cell.source for cell in code[1:])
    assert not any(line.startswith(("!", "%")) for line in plain.splitlines())
    assert len(code[-1].source.splitlines()) < 15
    assert "assert " in code[-1].source, "the last cell asserts what the notebook shows"


@pytest.mark.parametrize("name", ["predict", "everything", "train_from_scratch"])
def test_a_notebook_shows_its_outputs(name):
    """The fourth notebook downloads official weights."""
    path = COLABS / f"{name}.ipynb"
    assert path.stat().st_size < 2**20
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"][1:]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "save anew"
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    pictures = {"image/png", "image/jpeg"}
    assert sum(not pictures.isdisjoint(output.get("data", {})) for output in outputs) >= 3
    text = "\n".join(output.get("text", "") for output in outputs)
    assert not re.search(r"/(tmp|home|root)/", text), "paths of one machine"
