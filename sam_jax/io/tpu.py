"""Detection of TPUs, before JAX starts its devices."""

import os
from pathlib import Path

# Without these values, libtpu queries the network for them, and reports at length what is missing.
ENVIRONMENT_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def has_tpu() -> bool:
    """Returns True if this machine has a TPU."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def silence_libtpu() -> None:
    """Keeps libtpu quiet on a machine without a TPU, where only its compiler is of use.

    Every command calls this before JAX starts its devices. Variables that are set are not changed.
    """
    if not has_tpu():
        for name, value in ENVIRONMENT_WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
