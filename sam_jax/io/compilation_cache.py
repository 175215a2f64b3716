"""Keeps compiled programs on the disk, so that the next process does not compile them again."""

import contextlib
import hashlib
import platform
from pathlib import Path
from typing import Any

import jax

FOLDER = Path(".cache", "sam_jax", "compiled")  # in the home folder


def use_compilation_cache() -> None:
    """Makes JAX keep compiled programs in `FOLDER`, unless it keeps them elsewhere already.

    Programs are kept by the kind of device. Those for CPUs run on CPUs with the same instructions
    only. If there is no home folder, or the folder cannot be created in it, nothing is kept.
    """
    jax_config: Any = jax.config  # whose options are not known to type checkers
    if jax_config.jax_compilation_cache_dir:
        return
    kind = _cpu_digest() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        folder = Path.home() / FOLDER / kind.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        jax_config.update("jax_compilation_cache_dir", str(folder))


def _cpu_digest() -> str:
    """Returns a digest of the instructions that this machine's CPU has."""
    text = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"cpu_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
