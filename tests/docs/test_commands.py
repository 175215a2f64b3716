"""Tests that every command and example of the README and the guides runs."""

import os
import subprocess
import sys

import pytest

from tests import compilation
from tests.docs.pages import ROOT


@pytest.mark.slow
def test_every_page_runs_from_top_to_bottom(tmp_path):
    command = [sys.executable, "-m", "tests.docs.run_pages", str(tmp_path)]
    flags = f"{compilation.XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
