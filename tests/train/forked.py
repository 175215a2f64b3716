"""Processes that are killed: `python -m train`, and a process that only saves a checkpoint.

They are forked from a process in which all modules are imported, since most of the time of a short
run is spent on imports.
"""

import multiprocessing
import os
import signal
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import jax

from tests import compilation
from tests.train.test_checkpoints import make_state, open_checkpoints
from train import __main__ as command
from train.sharding import make_mesh

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # see `sys.audit`


def forkserver() -> ForkServerContext:
    """Returns a `multiprocessing` context whose processes start with this module imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def train(config: Path, workdir: Path, *settings: str) -> None:
    """Runs `python -m train` on one device. The output goes to a file beside the workdir."""
    with open(workdir.with_suffix(".txt"), "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["XLA_FLAGS"] = compilation.XLA_FLAGS
    jax.config.update("jax_num_cpu_devices", 1)
    sys.argv = ["train", str(config), "--workdir", str(workdir), "--set", *settings]
    sys.exit(command.main())


def save_and_die(folder: Path, step: int, last: int, counter: Path) -> None:
    """Saves a checkpoint and kills itself in the middle.

    Args:
      folder: The folder of the checkpoints.
      step: The step to save.
      last: The number of the file operation before which the process kills itself.
      counter: A file to which the number of file operations is written if there are fewer.
    """
    count = 0

    def count_or_die(event: str, args: tuple) -> None:
        nonlocal count
        if event in FILE_EVENTS and str(folder) in str(args[0]):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    jax.config.update("jax_num_cpu_devices", 1)
    mesh = make_mesh(1)
    checkpoints = open_checkpoints(folder, mesh)
    state = make_state(mesh, step)
    sys.addaudithook(count_or_die)
    checkpoints.save(step, state)
    checkpoints.close()
    counter.write_text(str(count))
