"""The error of commands whose packages are not installed."""

import os
import subprocess
import sys

import pytest

from tests.train.running import ROOT


@pytest.mark.parametrize("module", ["train", "train.compile", "train.supervise"])
def test_a_missing_package_is_named_in_one_line(tmp_path, module):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['grain'] = None")
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "training needs grain; install the extra train: pip install -e" in done.stderr
