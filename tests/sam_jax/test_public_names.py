"""Tests the public names of the package, and the packages that importing them loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sam_jax

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "torchvision", "tensorflow", "tensorflow_datasets", "orbax", "grain"}


def imported_by(statement):
    """Returns the third-party packages that a statement imports in a new process."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_imports_no_heavy_package():
    found = imported_by("import sam_jax; dir(sam_jax); sam_jax.__version__")
    assert "sam_jax" in found
    assert not found & (HEAVY | {"jax", "jaxlib", "flax", "numpy", "matplotlib"})


def test_importing_every_public_name_imports_no_heavy_package():
    found = imported_by("from sam_jax import *")
    assert {"jax", "flax"} <= found
    assert not found & (HEAVY | {"matplotlib"})


def test_every_public_name_is_listed_and_comes_from_its_module():
    tree = ast.parse(Path(sam_jax.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = {
        alias.name: node.module
        for node in imports
        for alias in node.names
        if node.module.startswith("sam_jax.")
    }
    assert sam_jax.__all__ == sorted(modules)
    assert [name for name in sam_jax.__all__ if name not in sam_jax.__doc__] == []
    assert set(sam_jax.__all__) <= set(dir(sam_jax))
    for name, module in modules.items():
        assert getattr(sam_jax, name).__name__ == name
        assert getattr(sam_jax, name).__module__ == module


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'SamModel'"):
        _ = sam_jax.SamModel


def test_the_package_has_types():
    assert Path(sam_jax.__file__).with_name("py.typed").exists()
