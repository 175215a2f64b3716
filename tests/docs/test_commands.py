"""Tests that every command and example of the README and the guides runs, page by page."""

import os
import subprocess
import sys

import pytest

from tests import compilation
from tests.docs.pages import PAGES, ROOT, read_blocks


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in PAGES if read_blocks(path)], ids=lambda path: path.stem
)
def test_a_page_runs_from_top_to_bottom(path, tmp_path):
    command = [sys.executable, "-P", "-m", "tests.docs.run_page", str(path)]
    flags = f"{compilation.XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
