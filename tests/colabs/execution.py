"""Runs notebooks, and saves them with their outputs.

python -m tests.colabs.execution predict everything train_from_scratch
"""

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

ROOT = Path(__file__).parents[2]
COLABS = ROOT / "colabs"
MAX_WIDTH, MAX_HEIGHT = 1200, 2000  # pixels


def run_notebook(path, folder, parameters=""):
    """Runs all cells but the setup of a notebook, in a folder as after a checkout.

    Args:
      path: The notebook.
      folder: The working directory, an empty folder.
      parameters: Code to run after the cell of parameters.

    Returns:
      The notebook with its outputs.
    """
    notebook = nbformat.read(path, as_version=4)
    (folder / "docs").symlink_to(ROOT / "docs")
    os.environ["PYTHONPATH"] = str(ROOT)  # `train` and `configs` are not installed
    cells, sources = notebook.cells, [cell.source for cell in notebook.cells]
    notebook.cells = [cell for cell in cells if "setup" not in tags(cell)]
    (cell,) = (cell for cell in notebook.cells if "parameters" in tags(cell))
    cell.source += f"\n{parameters}"
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    notebook.cells = cells
    for cell, source in zip(cells, sources, strict=True):
        cell.source = source
    return notebook


def save_outputs(path):
    """Runs a notebook and saves it with its outputs, without progress bars."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = run_notebook(path, Path(folder))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
            for output in cell.outputs:
                shrink_picture(output.get("data", {}))
    nbformat.write(notebook, path)


def shrink_picture(data):
    """Replaces a PNG by a JPEG of limited size if that is smaller, as for photographs."""
    if "image/png" not in data:
        return
    jpeg = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
    picture.thumbnail((MAX_WIDTH, MAX_HEIGHT))
    picture.save(jpeg, "JPEG", quality=85, optimize=True)
    text = base64.b64encode(jpeg.getvalue()).decode()
    if len(text) < len(data["image/png"]):
        del data["image/png"]
        data["image/jpeg"] = text


def tags(cell):
    """Returns the tags of a cell."""
    return cell.metadata.get("tags", [])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        save_outputs(COLABS / f"{name}.ipynb")
