"""Compiles programs quickly, as tests wait for the compiler more than for results."""

import atexit
import os
import tempfile

# These options compile two to three times faster and change results by rounding alone.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
XLA_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())


def share_cache() -> None:
    """Lets all processes of a session share the programs that they compile.

    The workers of pytest-xdist and the processes that tests start inherit the environment, where
    JAX finds the folder when it is imported. A folder that is named there already is used and kept;
    any other is removed when this process ends.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="sam_jax_compiled_", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
