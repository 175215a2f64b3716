"""Tests that memory, threads and open files of a long run do not grow."""

import json
import os
import subprocess
import sys

import pytest

from tests import compilation
from tests.train.running import AUTOENCODER, ROOT

STEPS = 5000

# Trains, and prints what the process uses after every thousand steps.
TRAIN = """
import json, os, sys
from pathlib import Path
from train import __main__ as command
from train.metrics import Metrics

def print_usage():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    usage = {
        "kB": sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap")),
        "threads": int(status["Threads"]),
        "files": len(os.listdir("/proc/self/fd")),
    }
    print("usage", json.dumps(usage), flush=True)

steps = 0
def advance(self):
    global steps
    steps += 1
    if steps % 1000 == 0:
        print_usage()

if __name__ == "__main__":
    Metrics.advance = advance
    sys.exit(command.main())
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_threads_and_open_files_do_not_grow(tmp_path):
    config, script = tmp_path / "autoencoder.py", tmp_path / "main.py"
    config.write_text(AUTOENCODER)
    script.write_text(TRAIN)
    command = [sys.executable, script, config, "--workdir", tmp_path / "run", "--set"]
    command += [f"num_steps={STEPS}", "log_every=20", "checkpoint_every=100000", "evaluate_every=0"]
    # With one pool of memory, its fragments do not depend on which thread runs when.
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": compilation.XLA_FLAGS,
        "JAX_NUM_CPU_DEVICES": "1",
        "MALLOC_ARENA_MAX": "1",
    }
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("usage ")]
    rows = [json.loads(line.removeprefix("usage ")) for line in lines]
    assert len(rows) == STEPS // 1000
    warm, *later = rows
    growth = (later[-1]["kB"] - warm["kB"]) / len(later)
    assert growth < 1024, rows
    assert all(row["threads"] <= warm["threads"] + 1 for row in later), rows
    assert all(row["files"] <= warm["files"] + 1 for row in later), rows
