"""Runtime type checks, including array shapes, of all functions of the project during tests.

`SAM_JAX_TYPECHECK=0` disables them. Processes that tests start are not checked.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beartype
import jaxtyping

ROOT = Path(__file__).resolve().parents[1]

# An int is accepted as a float, as by static type checkers.
CONF = beartype.BeartypeConf(is_pep484_tower=True)


def is_on() -> bool:
    """Returns True if type checks are enabled."""
    return os.environ.get("SAM_JAX_TYPECHECK", "1") != "0"


def install() -> None:
    """Installs type checks for all modules of the project that are imported afterwards.

    The `__init__.py` files of the packages are not checked, since the import hook adds a name to
    each module.
    """
    modules = [
        f"{package}.{path.stem}"
        for package in ("sam_jax", "train")
        for path in sorted((ROOT / package).iterdir())
        if path.stem not in ("__init__", "__pycache__")
    ]
    if is_on():
        jaxtyping.install_import_hook(modules, "tests.typecheck.typecheck")


def typecheck(function: Callable) -> Callable:
    """Decorates a function so that arguments and results of wrong types raise an error.

    Constructors of dataclasses that are pytrees are not checked: `jax.tree.map`, `jax.vmap` and
    `jax.eval_shape` build them from values of any type.
    """
    checked = beartype.beartype(function, conf=CONF)
    if function.__name__ != "__init__":
        return checked

    @functools.wraps(function)
    def check_constructor(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_pytree = getattr(type(self), "_flax_dataclass", False)
        return (function if is_pytree else checked)(self, *args, **kwargs)

    return check_constructor
