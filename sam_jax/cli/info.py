"""What a bug report needs: versions, devices, memory, and the model behind some weights."""

import importlib.metadata
import platform

import jax

import sam_jax

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "einops", "scipy", "pillow", "safetensors")


def print_info(weights=None):
    """Prints a block of text; `weights` is anything that `sam_jax.load` takes."""
    print(f"sam_jax    {sam_jax.__version__}")
    print(f"python     {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package:10} {importlib.metadata.version(package)}")
    for device in jax.devices():
        print(f"device     {device} ({device.device_kind}){_memory_of(device)}")
    if weights is not None:
        _print_model(weights)


def _memory_of(device):
    stats = device.memory_stats()  # None on CPUs
    if not stats or "bytes_limit" not in stats:
        return ""
    used, limit = stats.get("bytes_in_use", 0), stats["bytes_limit"]
    return f", {used / 2**30:.1f} of {limit / 2**30:.1f} GiB in use"


def _print_model(weights):
    model, variables = sam_jax.load(weights)
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    print(f"weights    {weights}: {count:,} trainable parameters, {4 * count / 2**20:.0f} MiB")
    print(model)
