"""Processes that are killed at random, and at chosen operations while a checkpoint is saved."""

import hashlib
import shutil
import time

import numpy as np
import pytest

from tests.train import forked
from tests.train.running import CONFIG, losses
from tests.train.test_checkpoints import assert_equal, make_state, open_checkpoints, restore
from train.rows import read_rows
from train.sharding import make_mesh

KILLS = 10  # of each of two runs
SETTINGS = ("num_steps=80", "checkpoint_every=2")


@pytest.fixture(scope="module")
def context():
    return forked.forkserver()


def digest(workdir):
    return hashlib.sha256((workdir / "weights" / "weights.safetensors").read_bytes()).hexdigest()


def count_rows(workdir):
    path = workdir / "metrics.jsonl"
    return len(read_rows(path)) if path.exists() else 0


@pytest.mark.long
def test_two_runs_that_are_killed_twenty_times_have_the_same_result(context, tmp_path):
    config = tmp_path / "small.py"
    config.write_text(CONFIG)
    rng = np.random.default_rng(0)

    def start(name):
        process = context.Process(target=forked.train, args=(config, tmp_path / name, *SETTINGS))
        process.start()
        return process

    def finish(name, process):
        process.join(300)
        assert process.exitcode == 0, (tmp_path / f"{name}.txt").read_text()

    names = ("a", "b")
    uninterrupted = start("uninterrupted")
    for i in range(KILLS):
        processes = {name: start(name) for name in names}
        targets = {name: 7 * i + int(rng.integers(1, 7)) for name in names}
        deadline = time.monotonic() + 300
        while processes:
            for name, process in list(processes.items()):
                assert process.exitcode is None, (tmp_path / f"{name}.txt").read_text()
                if count_rows(tmp_path / name) >= targets[name]:
                    process.kill()
                    process.join()
                    del processes[name]
            assert time.monotonic() < deadline
            time.sleep(rng.uniform(0, 0.02))
    finish("uninterrupted", uninterrupted)
    for name, process in {name: start(name) for name in names}.items():
        finish(name, process)
        workdir = tmp_path / name
        assert losses(workdir) == losses(tmp_path / "uninterrupted")
        assert digest(workdir) == digest(tmp_path / "uninterrupted")
        assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"78", "80"}
        assert "Traceback" not in (tmp_path / f"{name}.txt").read_text()


@pytest.mark.long
def test_a_save_that_is_killed_at_ten_places_leaves_the_checkpoint_before_it(context, tmp_path):
    mesh = make_mesh(8)
    before = tmp_path / "before"
    checkpoints = open_checkpoints(before, mesh)
    checkpoints.save(2, make_state(mesh, 2))
    checkpoints.close()

    def save(name, last):
        folder = shutil.copytree(before, tmp_path / name)
        counter = tmp_path / f"{name}.txt"
        process = context.Process(target=forked.save_and_die, args=(folder, 4, last, counter))
        process.start()
        process.join(120)
        return folder, process.exitcode, counter

    _, code, counter = save("complete", 0)
    assert code == 0
    count = int(counter.read_text())
    assert count >= 10
    restored = []
    for last in np.linspace(1, count, 10).astype(int).tolist():
        folder, code, _ = save(str(last), last)
        assert code in (0, -9)  # the number of operations varies a little
        step = 4 if (folder / "4").exists() else 2
        assert_equal(restore(folder, mesh), make_state(mesh, step))
        restored.append(step)
        if step == 2:  # the step is done again
            checkpoints = open_checkpoints(folder, mesh)
            checkpoints.save(4, make_state(mesh, 4))
            checkpoints.close()
        assert_equal(restore(folder, mesh), make_state(mesh, 4))
        assert {path.name for path in folder.iterdir()} == {"2", "4"}
    assert restored[0] == 2
    assert restored.count(2) >= 5
