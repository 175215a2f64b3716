"""Runs every fuzzed reader on a few files, and on many if slow tests are selected."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz.harness import Target, fuzz
from tests.fuzz.tables import TABLES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", TABLES)
def test_mutated_files_are_read_or_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = [fuzz(target, 12) for target in TABLES[name](tmp_path)]
    assert [fault for result in results for fault in result.faults] == []
    assert sum(result.read for result in results)
    assert sum(result.refused for result in results)
    assert not Path("canary").exists()
    assert "antigravity" not in sys.modules


@pytest.mark.long
@pytest.mark.parametrize("name", TABLES)
def test_20_000_mutated_files_are_read_or_refused(name):
    command = [sys.executable, "-m", "tests.fuzz", "--count", "20000", "--table", name]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("\n0 faults\n")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda data: os.system("true"), r"executed \['os.system'\]"),
        (lambda data: 1 // len(data[:0]), "ZeroDivisionError"),
        (lambda data: time.sleep(60), "Hang: not read within 0.1 s"),
        (lambda data: np.ones(64 << 20, np.uint8).sum(), r"took \d+ MiB"),
    ],
    ids=["execution", "another error", "hang", "memory"],
)
def test_faults_are_found(read, message):
    """Checks the harness with a reader that fails for every file but the valid one."""
    valid = b"valid file"
    target = Target("reader", valid, lambda data: None if data == valid else read(data))
    max_seconds = 0.1 if "Hang" in message else 60.0
    result = fuzz(target, 3, max_seconds=max_seconds, max_memory=32 << 20)
    if sys.platform == "linux" or "took" not in message:
        assert re.match(f"reader, file 0: {message}", result.faults[0])
