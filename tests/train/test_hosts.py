"""Checks that training on several hosts has the results of training on one."""

import functools
import json
import os
import socket

import jax
import numpy as np
import pytest

import sam_jax
from tests.train.running import CONFIG, finish, losses, start_run

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts `python -m train` in a process."""
    config = tmp_path_factory.mktemp("configs") / "small.py"
    config.write_text(CONFIG)
    return functools.partial(start_run, config)


def train_on_two_hosts(start, workdir, *settings):
    """Trains in two processes of four devices each, and returns their outputs."""
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        address = f"localhost:{free_port.getsockname()[1]}"
    hosts = [
        start(
            workdir,
            *("batch_size=8", "fsdp=2", *settings),
            devices=4,
            hosts=["--coordinator", address, "--processes", "2", "--process", str(i)],
        )
        for i in range(2)
    ]
    outputs = [finish(host) for host in hosts]
    assert not any("Traceback" in output for output in outputs)
    return outputs


def test_two_hosts_with_four_devices_match_one_host_with_eight(start, tmp_path):
    finish(start(tmp_path / "one", "batch_size=8", "num_steps=4", "fsdp=2", devices=8))
    train_on_two_hosts(start, tmp_path / "two", "num_steps=4")
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        np.testing.assert_allclose(two[1], one[1], rtol=1e-5)
        np.testing.assert_allclose(two[2], one[2], atol=2e-4)
    weights = [sam_jax.load(tmp_path / name / "weights")[1] for name in ("one", "two")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *weights)
    scores = [
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")
    ]
    assert scores[0]["objects"] == scores[1]["objects"] > 0


def test_both_hosts_resume_from_the_checkpoint_before_a_damaged_one(start, tmp_path):
    workdir, settings = tmp_path / "run", ("checkpoint_every=2", "log_every=1")
    train_on_two_hosts(start, workdir, *settings, "num_steps=4")
    before = losses(workdir)
    for path in (workdir / "checkpoints" / "4" / "state").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)
    first, second = train_on_two_hosts(start, workdir, *settings, "num_steps=6")
    assert "checkpoint 4 is damaged: " in first
    assert "resuming from step 2\n" in first
    assert "damaged" not in second, "the lead host reports for all"
    assert (workdir / "checkpoints" / "4.damaged" / "reason.txt").is_file()
    after = losses(workdir)
    assert after[:4] == before
    assert [step for step, *_ in after] == [1, 2, 3, 4, 5, 6]
