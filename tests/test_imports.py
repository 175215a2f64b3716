"""Tests rules for imports that `lint-imports` cannot check.

Other rules are contracts in setup.cfg, which `make lint` checks. They define the layers, and the
modules that may import a third-party package.
"""

import ast
import configparser
import json
import re
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
# All modules may import these packages. Every other package needs a contract in setup.cfg.
UNRESTRICTED = {"jax", "flax", "numpy", "einops", "scipy", "jaxtyping"}


def packages_with_a_contract():
    """Returns the third-party packages that the contracts in setup.cfg protect."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    contracts = [settings[name] for name in settings if name.startswith("importlinter:contract:")]
    return {
        module
        for contract in contracts
        if contract["type"] == "protected"
        for module in contract["protected_modules"].split()
        if module != "sam_jax"
    }


def test_every_third_party_package_has_a_contract():
    graph = grimp.build_graph(
        "sam_jax", "train", "configs", include_external_packages=True, cache_dir=None
    )
    third_party = {module for module in graph.modules if graph.is_module_squashed(module)}
    packages = {module.split(".")[0] for module in third_party} - set(sys.stdlib_module_names)
    assert packages - UNRESTRICTED <= packages_with_a_contract()
    assert {"jax", "optax"} <= packages


def code_of(notebook):
    """Returns the code of a notebook without the lines that only IPython understands."""
    cells = [c for c in json.loads(notebook)["cells"] if c["cell_type"] == "code"]
    source = "\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^( *)[!%].*", r"\1pass", source, flags=re.MULTILINE)


def modules_imported_in(source):
    """Yields the modules that the import statements of a source name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_modules_imported_in_a_notebook_are_found():
    cells = [
        {"cell_type": "markdown", "source": ["import torch"]},
        {"cell_type": "code", "source": ["%pip install x\n", "if 1:\n", "  !ls"]},
        {"cell_type": "code", "source": "import a.b\nfrom c import d"},
    ]
    source = code_of(json.dumps({"cells": cells}))
    assert source == "pass\nif 1:\n  pass\nimport a.b\nfrom c import d"
    assert set(modules_imported_in(source)) == {"a.b", "c"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_neither_tests_nor_torch(path):
    modules = modules_imported_in(code_of(path.read_text(encoding="utf-8")))
    packages = {module.split(".")[0] for module in modules}
    assert "sam_jax" in packages
    assert not packages & {"tests", "torch", "torchvision"}


def test_arrays_are_loaded_without_pickles():
    """Checks `allow_pickle`. Ruff has rules for other calls that could execute data."""
    for folder in ("sam_jax", "train", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found = re.findall(r"allow_pickle\s*=\s*(?!False)\S+", path.read_text("utf-8"))
            assert not found, path
