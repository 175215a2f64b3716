"""Checks annotations, shapes included, of every function of the project while tests run.

`SAM_JAX_TYPECHECK=0` switches it off. Processes that tests start are not checked.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beartype
import jaxtyping

ROOT = Path(__file__).resolve().parents[1]

# As for static type checkers, an int is a float.
CONF = beartype.BeartypeConf(is_pep484_tower=True)


def is_on() -> bool:
    """Returns whether annotations are to be checked."""
    return os.environ.get("SAM_JAX_TYPECHECK", "1") != "0"


def install() -> None:
    """Checks the calls of all functions of the project that are imported afterwards.

    The `__init__.py` of a package stays as it is, since the hook adds a name to what it imports.
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
    """Decorates a function so that arguments of wrong types raise.

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
