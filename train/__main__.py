"""Trains a model: `python -m train configs/sam_tiny.py --workdir runs/tiny [--set a.b=c ...]`."""

import argparse
import logging
import os
import sys

import jax
from tqdm.contrib.logging import logging_redirect_tqdm

from sam_jax.data.example import SourceError
from sam_jax.io.compilation_cache import use_compilation_cache
from sam_jax.io.console import escape_output
from sam_jax.io.tpu import has_tpu, silence_libtpu
from train import peers
from train.checkpoint_reading import CheckpointError
from train.config import ConfigError
from train.divergence import DivergedError
from train.overrides import load_config, override, to_json
from train.preemption import Stopped, StopSignals, kill_children
from train.run import run

log = logging.getLogger("train")


def main() -> int:
    """Runs a config and returns the exit code.

    Returns:
      0 done, 1 failed, 2 wrong usage, 130 stopped by SIGINT, 143 stopped by SIGTERM.
    """
    escape_output()
    silence_libtpu()
    args = make_parser().parse_args()
    # Some import has configured the root logger before.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    signals = StopSignals()
    try:
        with signals.installed(), logging_redirect_tqdm():
            if connect(args.coordinator, args.processes, args.process):
                signals.connect()
            # Other hosts log the same: only warnings of them are of interest.
            log.setLevel(logging.WARNING if jax.process_index() else logging.INFO)
            train(args, signals)
    except Stopped as stop:
        print(f"train: {stop}", file=sys.stderr)
        return stop.exit_code
    except (CheckpointError, ConfigError, SourceError, DivergedError, OSError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    finally:
        kill_children()
    return 0


def train(args: argparse.Namespace, signals: StopSignals) -> None:
    """Runs the config of the command line."""
    config = override(load_config(args.config), args.set)
    use_compilation_cache()
    if args.verbose:
        print(to_json(config), end="", flush=True)
    run(config, args.workdir, signals)


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
    parser.add_argument(
        "--verbose", action="store_true", help="print all fields of the config, as JSON"
    )
    hosts = parser.add_argument_group("several hosts; TPU pods need none of these options")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    hosts.add_argument("--processes", type=int, help="number of processes")
    hosts.add_argument("--process", type=int, help="index of this process, from 0")
    return parser


def connect(coordinator: str | None, processes: int | None, process: int | None) -> bool:
    """Connects to the other hosts: those of the coordinator, or those of a TPU pod.

    Args:
      coordinator: The address of process 0; None on TPU pods and single machines.
      processes: The number of processes.
      process: The index of this process.

    Returns:
      Whether there are other hosts to connect to.
    """
    if not coordinator and not has_tpu():
        return False
    peers.connect(coordinator, processes, process)
    return True


if __name__ == "__main__":
    # One XLA device per core: data parallelism uses the cores better than intra-op threads.
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", os.cpu_count())
    sys.exit(peers.end_together(main))
