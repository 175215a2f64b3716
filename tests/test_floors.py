"""Imports go down the floors, each outside package has its home, and nothing shipped runs data.

The tables are the architecture's; a new room or package is an entry here first.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sam_jax

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("sam_jax", "train", "configs", "colabs")

# What each room (of `train`, each file) may import of the project, apart from itself.
NETWORKS = ("sam_jax.model", "sam_jax.masks")
USES = (*NETWORKS, "sam_jax.predict", "sam_jax.weights", "sam_jax.data")
LIBRARY = (*USES, "sam_jax.evaluate", "sam_jax.export", "sam_jax.engine")
LEAVES = (
    *LIBRARY,
    "train.config",
    "train.objectives.prompt_sampling",
    "train.objectives.losses",
    "train.sharding",
    "train.flops",
    "train.overrides",
)
PARTS = (
    *LEAVES,
    "train.state",
    "train.objectives.interactive",
    "train.objectives.reconstruction",
    "train.optimizer",
)
FILES = (
    "train.checkpoints",
    "train.embedding_cache",
    "train.metrics",
    "train.remote_workdir",
    "train.report.html",
    "train.report.curves",
    "train.workdir",
)
USERS = (
    "train.step",
    "train.initialization",
    "train.objectives.rollout",
    "train.report.qualitative",
    "train.report",
)
TASKS = (
    "train.report.reconstruction",
    "train.tasks.segmentation",
    "train.tasks.reconstruction",
    "train.tasks.base",
)
STEPS = (*PARTS, *FILES, *USERS, *TASKS)
BELOW = {
    "sam_jax.model": (),
    "sam_jax.masks": (),
    "sam_jax.predict": (*NETWORKS, "sam_jax.images.read", "sam_jax.images.resize"),
    "sam_jax.images.read": (),  # these two are for `data` too
    "sam_jax.images.resize": (),
    "sam_jax.weights": ("sam_jax.model",),
    "sam_jax.data": ("sam_jax.masks", "sam_jax.images.resize", "sam_jax.images.read"),
    "sam_jax.evaluate": USES,
    "sam_jax.export": USES,
    "sam_jax.engine": (*USES, "sam_jax.images.read"),
    "sam_jax.cli.everything": ("sam_jax", "sam_jax.engine", *USES),
    "sam_jax": LIBRARY,  # the public names
    "sam_jax.cli.info": ("sam_jax", *LIBRARY),
    "sam_jax.cli": ("sam_jax", "sam_jax.cli.info", "sam_jax.cli.everything", *LIBRARY),
    "sam_jax.__main__": ("sam_jax.cli",),
    "train": (),
    "train.config": LIBRARY,
    "train.overrides": (*LIBRARY, "train.config"),
    "train.objectives.prompt_sampling": (*LIBRARY, "train.config"),
    "train.objectives.losses": (*LIBRARY, "train.config"),
    "train.sharding": (*LIBRARY, "train.config"),
    "train.state": LEAVES,
    "train.objectives.interactive": LEAVES,
    "train.objectives.reconstruction": LEAVES,
    "train.optimizer": LEAVES,
    "train.step": PARTS,
    "train.initialization": ("sam_jax", *PARTS),
    "train.objectives.rollout": PARTS,
    "train.checkpoints": LEAVES,
    "train.embedding_cache": LEAVES,
    "train.metrics": LEAVES,
    "train.remote_workdir": LEAVES,
    "train.workdir": LEAVES,
    "train.report.curves": LEAVES,
    "train.report.qualitative": (*PARTS, "train.report.curves"),
    "train.report.html": ("train.report.curves",),
    "train.report": (
        *PARTS,
        "train.metrics",
        "train.report.html",
        "train.report.curves",
        "train.report.qualitative",
    ),
    "train.report.reconstruction": (
        *PARTS,
        "train.metrics",
        "train.report.html",
        "train.report.curves",
    ),
    "train.tasks.segmentation": (*PARTS, "train.embedding_cache", "train.report"),
    "train.tasks.reconstruction": (*PARTS, "train.report.reconstruction"),
    "train.tasks.base": (
        *LIBRARY,
        "train.config",
        "train.tasks.segmentation",
        "train.tasks.reconstruction",
    ),
    "train.run": ("sam_jax", *STEPS),
    "train.flops": (*LIBRARY, "train.config", "train.objectives.prompt_sampling"),
    "train.aot.chips": ("train.flops",),
    "train.aot.hlo_cost": ("sam_jax.model", "train.aot.chips"),
    "train.aot.lower": (*STEPS, "train.aot.chips", "train.aot.hlo_cost"),
    "train.aot": (*STEPS, "train.aot.chips", "train.aot.hlo_cost", "train.aot.lower"),
    "train.compile": ("train.aot",),
    "train.__main__": (*STEPS, "train.run"),
    "configs": ("train.config", "sam_jax.model"),
}
PROJECT = ("sam_jax", "train", "configs", "colabs", "tests")

# Where an outside package may be imported. Torch is a reference to compare with, in tests alone.
EVERYWHERE = ("jax", "flax", "numpy", "einops", "scipy")
HOMES = {
    "PIL": ("sam_jax.predict", "sam_jax.data", "sam_jax.engine", "sam_jax.cli"),
    "faster_coco_eval": ("sam_jax.evaluate",),
    "absl": ("sam_jax.data.loader",),
    "etils": ("train.checkpoints", "train.remote_workdir"),
    "fsspec": ("sam_jax.io.storage",),
    "grain": ("sam_jax.data.loader",),
    "jax2onnx": ("sam_jax.export",),
    "matplotlib": (
        "sam_jax.visualize.dataset_plots",
        "train.report.curves",
        "train.report.qualitative",
        "train.report.html",
        "train.report.reconstruction",
    ),
    "ml_dtypes": ("sam_jax.weights.torch_file",),
    "onnxruntime": ("sam_jax.export",),
    "optax": ("train.optimizer", "train.objectives.losses", "train.step", "train.state"),
    "orbax": ("train.checkpoints",),
    "safetensors": ("sam_jax.weights",),
    "starlette": ("sam_jax.engine",),
    "tensorboardX": ("train.metrics",),
    "tensorflow_datasets": ("sam_jax.data.sources.tfds",),
    "torch": (),
    "tqdm": ("sam_jax.weights.download", "sam_jax.cli.everything", "sam_jax.cli", "train"),
    "uvicorn": ("sam_jax.engine",),
}

FORBIDDEN_CALLS = (
    "eval",
    "exec",
    "os.popen",
    "os.system",
    "pickle.Unpickler",
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
)
FORBIDDEN_KEYWORDS = ("shell", "allow_pickle")  # unless they are False


def sources():
    """(path, module, source) of every file, and of every notebook as one file."""
    for name in SHIPPED:
        for path in sorted((ROOT / name).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield path, ".".join(parts).removesuffix(".__init__"), path.read_text(encoding="utf-8")
        for path in sorted((ROOT / name).rglob("*.ipynb")):
            yield path, f"colabs.{path.stem}", code_of(path.read_text(encoding="utf-8"))


def code_of(notebook):
    """The code cells of a notebook, without the lines that only IPython understands."""
    cells = [c for c in json.loads(notebook)["cells"] if c["cell_type"] == "code"]
    source = "\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^( *)[!%].*", r"\1pass", source, flags=re.MULTILINE)


def imports(tree, module, is_package=False):
    """(module, name or None) of every import, also in functions and by `import_module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")
            package = package[: len(package) - node.level + is_package] if node.level else []
            target = ".".join([*package, *filter(None, [node.module])])
            yield from ((target, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = dotted(node.func) or ""
            if called.split(".")[-1] in ("import_module", "__import__"):
                yield str(node.args[0].value), None


def dotted(node):
    """The name `a.b.c` of an expression, or None if it is another."""
    if isinstance(node, ast.Attribute):
        start = dotted(node.value)
        return start and f"{start}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def is_in(module, rooms):
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def room_of(module):
    """The entry of BELOW that a module is in, or its first name."""
    rooms = [room for room in BELOW if is_in(module, [room])]
    return max(rooms, key=len, default=module.split(".")[0])


def faults(module, source, is_package=False):
    """What the tables do not allow in a file, one line each."""
    tree = ast.parse(source)
    room = room_of(module)
    tour = room == "colabs"
    if not tour and (room not in BELOW or (room in ("sam_jax", "train") and module != room)):
        yield f"{module} is in no room of the table"
        return
    for target, name in imports(tree, module, is_package):
        package = target.split(".")[0]
        if package in PROJECT:
            imported = room_of(f"{target}.{name}" if name else target)
            allowed = tour and package != "tests"
            if not allowed and imported != room and imported not in BELOW.get(room, ()):
                yield f"{module} imports {imported}, which is not below it"
        elif package not in sys.stdlib_module_names and package not in EVERYWHERE:
            homes = HOMES.get(package, ("colabs",) if tour else None)
            if homes is None:
                yield f"{module} imports {package}, which has no home in the table"
            elif not homes or not (tour or is_in(module, homes)):
                yield f"{module} imports {package}, which is at home in {homes}"
    yield from (f"{module} {what}" for what in forbidden(tree))


def forbidden(tree):
    full = {}  # what the names in this file stand for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            full |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, *rest = (dotted(node.func) or "").split(".")
            called = ".".join([full.get(first, first), *rest]).removeprefix("builtins.")
            if called in FORBIDDEN_CALLS:
                yield f"calls {called}"
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in FORBIDDEN_KEYWORDS and not off:
                    yield f"passes {keyword.arg}="


def test_shipped_files_keep_to_the_tables():
    files = list(sources())
    assert {module.split(".")[0] for _, module, _ in files} >= {"sam_jax"}
    found = [f for p, m, text in files for f in faults(m, text, p.name == "__init__.py")]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("sam_jax.model.sam", "from sam_jax.predict import transforms", "imports sam_jax.predict"),
        ("sam_jax.model.sam", "from sam_jax import predict", "imports sam_jax.predict"),
        ("sam_jax.model.sam", "from sam_jax import Sam", "imports sam_jax, which"),
        ("sam_jax.model.sam", "from ..predict import transforms", "imports sam_jax.predict"),
        ("sam_jax.model.sam", "from .. import weights", "imports sam_jax.weights"),
        ("sam_jax.model.sam", "def f():\n  import sam_jax.masks.rle", "imports sam_jax.masks"),
        ("sam_jax.masks.rle", "import sam_jax.model.sam as s", "imports sam_jax.model"),
        ("sam_jax.weights.store", "import sam_jax.masks.rle", "imports sam_jax.masks"),
        ("sam_jax.weights.store", "from sam_jax.predict import predictor", "sam_jax.predict"),
        ("sam_jax.data.sources.sa1b", "from sam_jax.model.sam import Sam", "imports sam_jax.model"),
        (
            "sam_jax.predict.predictor",
            "import train.objectives.losses",
            "imports train.objectives.losses",
        ),
        ("sam_jax.evaluate.clicks", "from sam_jax.export import onnx", "imports sam_jax.export"),
        ("sam_jax.engine.loop", "import sam_jax.cli", "imports sam_jax.cli"),
        ("sam_jax.cli", "import tests.conftest", "imports tests"),
        ("sam_jax.cli", "import importlib\nimportlib.import_module('train.run')", "train.run"),
        ("train.objectives.losses", "from train import step", "imports train.step"),
        ("train.config", "from train.optimizer import Optimizer", "imports train.optimizer"),
        (
            "train.state",
            "from train.objectives.interactive import x",
            "imports train.objectives.interactive",
        ),
        ("train.run", "import configs.sam_tiny", "imports configs"),
        ("configs.sam_tiny", "from sam_jax.weights import formats", "imports sam_jax.weights"),
        ("colabs.predict", "import tests.conftest", "imports tests"),
        ("sam_jax.helpers", "", "is in no room"),
        ("train.trainer", "", "is in no room"),
        ("sam_jax.weights.convert", "import torch", "imports torch"),
        ("colabs.predict", "import torch", "imports torch"),
        ("train.run", "import optax", "imports optax"),
        ("train.run", "from orbax import checkpoint", "imports orbax"),
        ("sam_jax.data.sources.sa1b", "import grain.python", "imports grain"),
        ("sam_jax.data.sources.coco", "import tensorflow_datasets as tfds", "tensorflow_datasets"),
        ("sam_jax.model.sam", "from PIL import Image", "imports PIL"),
        ("sam_jax.predict.predictor", "import safetensors.numpy", "imports safetensors"),
        ("sam_jax.predict.predictor", "import cv2", "has no home"),
        ("sam_jax.cli", "eval('1')", "calls eval"),
        ("sam_jax.cli", "import builtins\nbuiltins.exec('1')", "calls exec"),
        ("sam_jax.cli", "import pickle\npickle.load(f)", "calls pickle.load"),
        ("sam_jax.cli", "import pickle as p\np.loads(b)", "calls pickle.loads"),
        ("sam_jax.cli", "from pickle import loads as read\nread(b)", "calls pickle.loads"),
        ("sam_jax.cli", "from os import system\nsystem('ls')", "calls os.system"),
        ("sam_jax.cli", "import yaml\nyaml.load(f)", "calls yaml.load"),
        ("sam_jax.cli", "import torch\ntorch.load(f)", "calls torch.load"),
        ("sam_jax.cli", "import subprocess\nsubprocess.run(x, shell=True)", "passes shell="),
        ("sam_jax.cli", "import numpy as np\nnp.load(x, allow_pickle=yes)", "passes allow_pickle="),
    ],
)
def test_a_fault_is_found(module, source, fault):
    assert any(fault in found for found in faults(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sam_jax.predict.predictor", "from sam_jax.model.sam import Sam\nfrom PIL import Image"),
        ("sam_jax.model.sam", "from sam_jax.model import layers\nimport jax, scipy.ndimage"),
        ("sam_jax.model.sam", "from . import layers"),
        ("sam_jax.cli", "from sam_jax import __version__\ndef f():\n  import sam_jax.engine.loop"),
        ("train.objectives.losses", "import optax\nfrom train.config import TrainConfig"),
        ("train.__main__", "from train.run import run"),
        (
            "configs.sam_tiny",
            "import train.config\nfrom sam_jax.model.sam import Sam",
        ),
        ("colabs.predict", "import matplotlib.pyplot as plt\nimport sam_jax"),
        ("sam_jax.cli", "model.eval()\nnp.load(x, allow_pickle=False)\njax.eval_shape(f)"),
    ],
)
def test_what_is_allowed_is_not_a_fault(module, source):
    assert list(faults(module, source)) == []


def test_code_of_a_notebook():
    cells = [
        {"cell_type": "markdown", "source": ["import torch"]},
        {
            "cell_type": "code",
            "source": ["%pip install x\n", "if 1:\n", "  !ls"],
        },
        {"cell_type": "code", "source": "import torch"},
    ]
    source = code_of(json.dumps({"cells": cells}))
    assert source == "pass\nif 1:\n  pass\nimport torch"
    assert list(faults("colabs.x", source)) == ["colabs.x imports torch, which is at home in ()"]


def imported_by(statement):
    """The outside packages in `sys.modules` of a fresh process after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


HEAVY = {"torch", "torchvision", "tensorflow", "tensorflow_datasets", "orbax", "grain"}


def test_importing_the_package_imports_nothing_heavy():
    found = imported_by("import sam_jax; dir(sam_jax); sam_jax.__version__")
    assert "sam_jax" in found
    assert not found & (HEAVY | {"jax", "jaxlib", "flax", "numpy"})


def test_importing_every_public_name_imports_no_heavy_package():
    found = imported_by("from sam_jax import *")
    assert {"jax", "flax"} <= found
    assert not found & HEAVY


def test_public_names_are_there_once_and_listed():
    assert sorted(set(sam_jax.__all__)) == sorted(sam_jax.__all__)
    assert set(sam_jax.__all__) <= set(dir(sam_jax))
    assert set(sam_jax.__all__) == set(sam_jax._HOMES)
    for name in sam_jax.__all__:
        assert getattr(sam_jax, name).__name__ == name
        assert getattr(sam_jax, name).__module__ == sam_jax._HOMES[name]


def test_type_checkers_see_the_same_public_names():
    tree = ast.parse(Path(sam_jax.__file__).read_text(encoding="utf-8"))
    seen = {(name, target) for target, name in imports(tree, "sam_jax", True) if name is not None}
    assert seen - {("TYPE_CHECKING", "typing")} == set(sam_jax._HOMES.items())


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'SamModel'"):
        _ = sam_jax.SamModel
