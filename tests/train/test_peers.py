"""Tests that the processes of a run end together, with a fake service and with real processes."""

import functools
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import jax
import pytest

from tests.train.running import AUTOENCODER, CONFIG, finish, losses, start_run
from train.peers import DONE, FOLDER, SILENCE_LIMIT, Peers, end_together
from train.rows import read_rows


class Service:
    """The key-value store of JAX's coordination service."""

    def __init__(self):
        self.values, self.is_reachable = {}, True

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        if not self.is_reachable:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed\nmore")
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


class Run:
    """Three processes of a run, whose threads are run by the test."""

    def __init__(self):
        self.service, self.ended = Service(), {}
        self.peers = [Peers(self.service, i, 3, functools.partial(self.end, i)) for i in range(3)]

    def end(self, process, code, message):
        self.ended.setdefault(process, (code, message))

    def exchange(self, *processes, times=1):
        for _ in range(times):
            for process in processes:
                self.peers[process].exchange()
                self.peers[process].check()


@pytest.fixture
def run():
    return Run()


def test_processes_that_are_alive_do_not_end(run):
    run.exchange(1, times=20)  # before the others have begun
    run.exchange(0, 1, 2, times=50)
    assert run.ended == {}


def test_a_silent_process_ends_the_others(run):
    run.exchange(0, 1, 2, times=3)
    run.exchange(0, 2, times=SILENCE_LIMIT)
    assert run.ended == {}
    assert run.peers[2].suspect() == "process 1 has been silent for 6 s"
    run.exchange(0, 2, times=2)
    code, message = run.ended[2]
    assert (code, run.ended[0]) == (75, run.ended[2])
    assert message == "process 1 has been silent for 7 s: it was killed, or it is frozen"


def test_a_process_that_was_slow_is_forgiven(run):
    for _ in range(4):
        run.exchange(0, 1, 2)
        run.exchange(0, 2, times=SILENCE_LIMIT - 1)
    assert run.ended == {}


def test_a_frozen_coordinator_ends_the_others(run):
    run.exchange(0, 1, 2)
    for _ in range(SILENCE_LIMIT + 1):
        run.peers[1].check()
    name = "process 0, which coordinates the run,"
    assert run.ended == {1: (75, f"{name} has not answered for 7 s")}
    assert run.peers[1].suspect().startswith(f"{name} has ended, or another process")


def test_an_unreachable_coordinator_ends_the_others(run):
    run.exchange(0, 1, 2)
    run.service.is_reachable = False
    run.exchange(2)
    assert run.ended[2][0] == 75
    assert run.ended[2][1].endswith("cannot be reached: UNAVAILABLE: Socket closed")


def test_a_process_that_fails_ends_the_others_with_its_exit_code(run, monkeypatch):
    monkeypatch.setattr("train.peers.INTERVAL", 0)
    run.exchange(0, 1, 2)
    run.service.values[f"{FOLDER}1"] = json.dumps({"code": 1, "message": "see its output"})
    run.exchange(0, 2)
    assert run.ended[0] == run.ended[2] == (1, "process 1 has failed: see its output")


def test_a_process_that_is_done_may_be_silent(run):
    run.exchange(0, 1, 2)
    run.service.values[f"{FOLDER}1"] = DONE
    run.exchange(0, 2, times=3 * SILENCE_LIMIT)
    assert run.ended == {}


def test_threads_end_when_the_steps_are_done(run, monkeypatch):
    monkeypatch.setattr("train.peers.INTERVAL", 0.01)
    (peers, *_) = run.peers
    peers.start()
    peers.finish()
    assert run.service.values == {f"{FOLDER}0": DONE}
    assert "peers" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(("result", "code"), [(0, 0), (1, 1), (143, 143)])
def test_a_single_process_keeps_its_exit_code(result, code):
    assert end_together(lambda: result) == code


def test_an_unexpected_error_has_its_own_exit_code(capsys):
    assert end_together(lambda: 1 // 0) == 70
    assert "ZeroDivisionError" in capsys.readouterr().err


# The processes of a real run.


def start_pair(config, workdir, *settings, **options):
    """Starts two processes of a run."""
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        address = f"localhost:{free_port.getsockname()[1]}"
    hosts = ["--coordinator", address, "--processes", "2", "--process"]
    return [
        start_run(config, workdir, *settings, hosts=[*hosts, str(i)], **options) for i in range(2)
    ]


def wait_for_rows(workdir, count, processes):
    deadline = time.monotonic() + 240
    while len(read_rows(workdir / "metrics.jsonl")) < count:
        assert time.monotonic() < deadline
        for process in processes:
            if process.poll() is not None:
                output = process.stdout.read()
                if "Gloo context initialization failed" in output:
                    pytest.skip("on a busy machine, one process compiles 30 s later than the other")
                pytest.fail(output)
        time.sleep(0.05)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_process_ends_the_other(config, tmp_path, victim):
    pair = start_pair(config, tmp_path / "run", "batch_size=4", "num_steps=100000", devices=2)
    try:
        wait_for_rows(tmp_path / "run", 3, pair)
        survivor = pair[1 - victim]
        os.kill(pair[victim].pid, signal.SIGSTOP)
        start = time.monotonic()
        output, _ = survivor.communicate(timeout=120)
        seconds = time.monotonic() - start
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert survivor.returncode == 75, output
    assert output.splitlines()[-1].startswith(f"train: process {victim}"), output
    assert "Traceback" not in output
    assert seconds < longest_end()


@pytest.mark.long
def test_supervised_processes_of_which_either_is_killed_have_the_same_result(tmp_path):
    config = tmp_path / "autoencoder.py"
    config.write_text(AUTOENCODER)
    start = functools.partial(start_pair, config, devices=4)
    settings = ("batch_size=8", "num_steps=60", "optimizer.cosine_steps=60", "evaluate_every=0")
    for process in start(tmp_path / "uninterrupted", *settings):
        finish(process)
    pair = start(tmp_path / "killed", *settings, module="train.supervise")
    try:
        for victim, rows in ((0, 10), (1, 30)):
            wait_for_rows(tmp_path / "killed", rows, pair)
            killed, survivor = (child_of(pair[i]) for i in (victim, 1 - victim))
            os.kill(killed, signal.SIGKILL)
            end = time.monotonic() + longest_end()
            while survivor == child_of(pair[1 - victim]):
                assert time.monotonic() < end
                time.sleep(0.05)
        outputs = [process.communicate(timeout=240)[0] for process in pair]
    finally:
        for process in pair:
            process.terminate()
            process.communicate(timeout=60)
    for process, output in zip(pair, outputs, strict=True):
        assert process.returncode == 0, output
        assert output.count("the run ended with exit code 75") == 1, output
        assert output.count("the run ended with exit code 137") == 1, output
    uninterrupted, killed = (tmp_path / name for name in ("uninterrupted", "killed"))
    assert losses(killed) == losses(uninterrupted)
    assert [step for step, _, _ in losses(killed)] == list(range(1, 61))
    weights = [(run / "weights" / "mae.safetensors") for run in (uninterrupted, killed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def longest_end():
    """Returns the seconds in which a process must end; messages are delayed on a busy machine."""
    return 15 * max(1.0, os.getloadavg()[0] / os.cpu_count())


def child_of(supervisor):
    """Returns the process that a supervisor runs; None between two runs."""
    children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
    return int(children[0]) if children else None


@pytest.mark.long
def test_a_second_run_in_one_workdir_is_rejected(config, tmp_path):
    first = start_run(config, tmp_path / "run", "num_steps=100000")
    try:
        wait_for_rows(tmp_path / "run", 3, [first])
        second = start_run(config, tmp_path / "run", "num_steps=100000")
        output, _ = second.communicate(timeout=240)
        assert second.returncode == 1
        message = f"train: {tmp_path / 'run'} is in use by process {first.pid} on "
        assert output.splitlines()[-1].startswith(message)
    finally:
        first.kill()
        first.communicate()
    steps = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
