"""python -m train configs/sam_tiny.py --workdir runs/tiny [--set a.b=c ...]"""

import argparse
import logging
import os
import sys
from pathlib import Path

import jax

from sam_jax.data.example import SourceError
from train.config import ConfigError
from train.overrides import load_config, override, to_json
from train.run import run

# Programs for accelerators take minutes to compile; the next run finds them here.
COMPILED = Path.home() / ".cache" / "sam_jax" / "compiled"


def main() -> int:
    """Runs a config -> the exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m train", description="Train a SAM.")
    parser.add_argument("config", help="a Python file that assigns a TrainConfig to `config`")
    parser.add_argument(
        "--workdir", required=True, help="where all results go: a folder, or gs://..."
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="replace fields of the config, e.g. optimizer.peak_lr=1e-4 num_steps=60",
    )
    several = parser.add_argument_group(
        "several hosts, where they do not find each other as on TPUs"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process")
    several.add_argument("--processes", type=int, help="how many there are")
    several.add_argument("--process", type=int, help="which one this is, from 0")
    args = parser.parse_args()
    connect(args.coordinator, args.processes, args.process)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        config = override(load_config(args.config), args.set)
        if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
            jax.config.update("jax_compilation_cache_dir", str(COMPILED))
        print(to_json(config), end="", flush=True)
        run(config, args.workdir)
    except (ConfigError, SourceError, FileNotFoundError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    return 0


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Finds the other hosts: those named, or those of a TPU pod."""
    if (
        coordinator
        or any(Path("/dev").glob("accel[0-9]*"))
        or any(Path("/dev/vfio").glob("[0-9]*"))
    ):
        jax.distributed.initialize(coordinator, processes, process)


if __name__ == "__main__":
    # Cores are used better by a device each, with its share of a batch, than by one of them all.
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", os.cpu_count())
    sys.exit(main())
