"""`sam-jax info`: versions, devices, memory and a model, for bug reports."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

import jax

import sam_jax
from sam_jax.cli.help_texts import WEIGHTS_HELP
from sam_jax.weights.formats import load

# The packages that results depend on. Those of extras may be missing.
PACKAGES = (
    *("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "einops"),
    *("scipy", "pillow", "safetensors", "matplotlib"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    parser.description = "Prints what a bug report needs: versions, devices, memory and a model."
    parser.epilog = "example: sam-jax info --weights sam_b/"
    parser.add_argument("--weights", type=os.path.expanduser, help=WEIGHTS_HELP)


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    _print_line("sam_jax", f"{sam_jax.__version__}, in {Path(sam_jax.__file__).parent}")
    _print_line("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        _print_line(package, _version(package))
    for device in jax.devices():
        _print_line("device", f"{device} ({device.device_kind}){_memory_usage(device)}")
    if args.weights is not None:
        _print_model(args.weights)


def _print_line(name: str, value: str) -> None:
    print(f"{name:16} {value}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _memory_usage(device: jax.Device) -> str:
    stats = device.memory_stats()  # None on CPUs
    if not stats or "bytes_limit" not in stats:
        return ""
    used, limit = stats.get("bytes_in_use", 0), stats["bytes_limit"]
    return f", {used / 2**30:.1f} of {limit / 2**30:.1f} GiB in use"


def _print_model(path: str) -> None:
    model, variables = load(path)
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    _print_line("weights", f"{path}: {count:,} trainable parameters, {4 * count / 2**20:.0f} MiB")
    print(model)
