"""Tests that the loader's threads share a limit of memory."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sam_jax.images.read import MAX_IMAGE_PIXELS

LOAD = """
import resource, sys
import numpy as np
from sam_jax.data.crop_batch import RandomResizedCrop
from sam_jax.data.loader import Loader
from sam_jax.data.sources.images import open_images

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

source = open_images(sys.argv[1])
loader = Loader(source, np.arange(len(source)), RandomResizedCrop((64, 64), 16), 4, seed=0)
before = peak()
batches = list(loader.batches(0, len(source) // 4, prefetch=4))
assert not any(skipped for _, skipped in batches)
print(peak() - before)
"""


@pytest.mark.slow
def test_large_images_are_decoded_one_at_a_time(tmp_path):
    side = int(MAX_IMAGE_PIXELS**0.5)
    Image.fromarray(np.eye(side, dtype=np.uint8)).convert("RGB").save(tmp_path / "0.png")
    for i in range(1, 4):
        (tmp_path / f"{i}.png").hardlink_to(tmp_path / "0.png")
    for i in range(4, 16):
        Image.new("RGB", (640, 480), (i, 0, 0)).save(tmp_path / f"{i}.png")
    assert (tmp_path / "0.png").stat().st_size < 1_000_000
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 800, f"{result.stdout} MB"
