"""Trains a model: `python -m train configs/sam_tiny.py --workdir runs/tiny [--set a.b=c ...]`."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import jax

from sam_jax.data.example import SourceError
from train import peers
from train.config import ConfigError
from train.overrides import load_config, override, to_json
from train.run import run

# Programs for accelerators take minutes to compile. The next run finds them here.
COMPILATION_CACHE = Path.home() / ".cache" / "sam_jax" / "compiled"


def main() -> int:
    """Runs a config and returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    args = make_parser().parse_args()
    connect(args.coordinator, args.processes, args.process)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    jax_config: Any = jax.config  # whose options are not known to type checkers
    try:
        config = override(load_config(args.config), args.set)
        if jax.default_backend() != "cpu" and not jax_config.jax_compilation_cache_dir:
            jax_config.update("jax_compilation_cache_dir", str(COMPILATION_CACHE))
        print(to_json(config), end="", flush=True)
        run(config, args.workdir)
    except (ConfigError, SourceError, FileNotFoundError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m train", description="Trains a model.")
    parser.add_argument("config", help="a Python file that assigns a TrainConfig to `config`")
    parser.add_argument(
        "--workdir", required=True, help="the folder of all results: a path, or gs://..."
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="replace fields of the config, e.g. optimizer.peak_lr=1e-4 num_steps=60",
    )
    hosts = parser.add_argument_group("several hosts; TPU pods need none of these options")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    hosts.add_argument("--processes", type=int, help="number of processes")
    hosts.add_argument("--process", type=int, help="index of this process, from 0")
    return parser


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connects to the other hosts: those of the coordinator, or those of a TPU pod.

    Args:
      coordinator: The address of process 0; None on TPU pods and single machines.
      processes: The number of processes.
      process: The index of this process.
    """
    has_tpu = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if coordinator or has_tpu:
        peers.connect(coordinator, processes, process)


if __name__ == "__main__":
    # One XLA device per core: data parallelism uses the cores better than intra-op threads.
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", os.cpu_count())
    sys.exit(peers.end_together(main))
