"""Tests of workers that hang, are stopped or killed, and of what remains of them."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from sam_jax.data.example import Example, SourceError
from sam_jax.data.loader import Loader
from sam_jax.data.segmentation_batch import SegmentationTransform
from sam_jax.data.sources.synthetic import SyntheticScenes
from tests.processes import is_alive, wait_until

ROOT = Path(__file__).resolve().parents[3]

# Loads batches in two processes, and prints what happens to them.
LOAD = """
import multiprocessing, time
import numpy as np
from sam_jax.data.example import SourceError
from sam_jax.data.loader import Loader
from sam_jax.data.segmentation_batch import SegmentationTransform
from sam_jax.data.sources.synthetic import SyntheticScenes

def start():
    source = SyntheticScenes((40, 50), count=9)
    batches = Loader(source, np.arange(9), SegmentationTransform((48, 56), 2), 2, 0).batches(
        0, 10**6, workers=2
    )
    next(batches)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    return batches

if __name__ == "__main__":
    batches = start()
    while "is stopped" not in (reason := batches.describe()):
        time.sleep(0.02)
    print(reason, flush=True)
    try:
        while True:
            next(batches)
    except SourceError as error:
        print(error, flush=True)
    batches.close()
    print("left:", len(multiprocessing.active_children()), flush=True)
    batches = start()
    while True:
        next(batches)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_are_named_if_stopped_reported_if_killed_and_end_with_the_run(tmp_path):
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(script)]
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(120, run.kill)
    timer.start()
    with run:
        worker, _ = map(int, run.stdout.readline().split())
        os.kill(worker, signal.SIGSTOP)
        assert f"process {worker}, which loads data, is stopped" in run.stdout.readline()
        os.kill(worker, signal.SIGKILL)
        assert run.stdout.readline().startswith("a process that loads data (data.workers) was ki")
        assert run.stdout.readline() == "left: 0\n"
        workers = [int(pid) for pid in run.stdout.readline().split()]
        assert all(map(is_alive, workers))
        run.kill()
        wait_until(lambda: not any(map(is_alive, workers)))
    timer.cancel()


@dataclasses.dataclass(frozen=True)
class HangingSource(SyntheticScenes):
    """A source that blocks at one index, as a dead network mount does."""

    released: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __getitem__(self, index: int) -> Example:
        if index == 5:
            self.released.wait()
        return super().__getitem__(index)


def make_loader(source):
    transform = SegmentationTransform((48, 56), masks_per_image=2)
    return Loader(source, np.arange(len(source)), transform, batch_size=2, seed=0)


def test_a_sample_that_hangs_is_named():
    source = HangingSource((40, 50), count=9)
    batches = make_loader(source).batches(0, 6)
    assert batches.describe() == ""
    loaded = []
    thread = threading.Thread(target=lambda: loaded.extend(batches))
    thread.start()
    wait_until(lambda: f"sample 5 ({source.name(5)}) has loaded for " in batches.describe())
    source.released.set()
    thread.join()
    assert len(loaded) == 6
    assert batches.describe() == ""
    batches.close()


def test_the_file_of_the_samples_in_progress_is_removed(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    batches = make_loader(SyntheticScenes((40, 50), count=9)).batches(0, 6)
    next(batches)
    assert len(list(tmp_path.iterdir())) == 1
    batches.close()
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_workers_are_raised_as_they_are():
    class BrokenSource(HangingSource):
        def __getitem__(self, index: int) -> Example:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug") as error:
        next(make_loader(BrokenSource((40, 50), count=9)).batches(0, 6))
    assert not isinstance(error.value, SourceError)
