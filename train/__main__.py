"""python -m train configs/sam_tiny.py --workdir runs/tiny [--set a.b=c ...]"""

import argparse
import logging
import os
import sys
from pathlib import Path

import jax

from sam_jax.data.example import SourceError
from train.config import ConfigError, load_config, override, to_json
from train.run import run


def main() -> int:
    """Runs a config -> the exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m train", description="Train a SAM.")
    parser.add_argument("config", help="a Python file that assigns a TrainConfig to `config`")
    parser.add_argument("--workdir", required=True, type=Path, help="where all results go")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="replace fields of the config, e.g. optimizer.peak_lr=1e-4 num_steps=60",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        config = override(load_config(args.config), args.set)
        print(to_json(config), end="", flush=True)
        run(config, args.workdir)
    except (ConfigError, SourceError, FileNotFoundError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Cores are used better by a device each, with its share of a batch, than by one of them all.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    sys.exit(main())
