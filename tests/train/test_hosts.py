"""Checks that training on several hosts has the results of training on one."""

import functools
import json
import socket

import jax
import numpy as np
import pytest

import sam_jax
from tests.train.running import CONFIG, finish, losses, start_run


@pytest.mark.long
def test_two_hosts_with_four_devices_match_one_host_with_eight(tmp_path):
    config = tmp_path / "small.py"
    config.write_text(CONFIG)
    start = functools.partial(start_run, config)
    settings = ("batch_size=8", "num_steps=4", "fsdp=2")
    finish(start(tmp_path / "one", *settings, devices=8))
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        address = f"localhost:{free_port.getsockname()[1]}"
    hosts = [
        start(
            tmp_path / "two",
            *settings,
            devices=4,
            hosts=["--coordinator", address, "--processes", "2", "--process", str(i)],
        )
        for i in range(2)
    ]
    for output in map(finish, hosts):
        assert "Traceback" not in output
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        np.testing.assert_allclose(two[1], one[1], rtol=1e-5)
        np.testing.assert_allclose(two[2], one[2], atol=2e-4)
    weights = [sam_jax.load(tmp_path / name / "weights")[1] for name in ("one", "two")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *weights)
    scores = [
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")
    ]
    assert scores[0]["objects"] == scores[1]["objects"] > 0
