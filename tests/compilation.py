"""Compiler options for tests, which spend more time compiling than running programs."""

import atexit
import os
import tempfile

import jaxlib.version

# With these options, XLA compiles two to three times faster. Results differ only by rounding.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jaxlib.version.__version_info__ < (0, 11):  # later versions have no other emitters
    QUICK["xla_cpu_use_fusion_emitters"] = False
XLA_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())


def share_cache() -> None:
    """Sets up a compilation cache that all processes of a test run share.

    JAX reads the folder of the cache from an environment variable. The workers of pytest-xdist and
    the processes that tests start inherit it. If the variable is already set, its folder is used
    and kept. Otherwise, a temporary folder is used and removed when this process ends.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="sam_jax_compiled_", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
