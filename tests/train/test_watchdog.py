"""Tests of the watchdog with a fake clock, and in a run whose data stops."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import compilation
from tests.processes import is_alive, wait_until
from tests.train.running import CONFIG, ROOT
from train.rows import read_rows
from train.watchdog import Watchdog


class Step:
    """The values of a step, which finishes when `done` is set."""

    def __init__(self, done=False):
        self.done = done

    def is_ready(self):
        return self.done


class Run:
    """A run with a clock and a watchdog."""

    def __init__(self, folder, **options):
        self.now, self.ended, self.reason = 0.0, [], ""
        self.watchdog = Watchdog(
            folder / "stacks.txt",
            lambda code, message: self.ended.append((code, message)),
            clock=lambda: self.now,
            **options,
        )
        self.watchdog.describe = lambda: self.reason

    def train(self, *durations):
        """Finishes a step after each duration."""
        for duration in durations:
            step = Step()
            self.watchdog.advance(step)
            self.wait(duration)
            step.done = True
            self.watchdog.check()

    def wait(self, seconds):
        """Lets time pass, during which the watchdog looks at the run ten times."""
        for _ in range(10):
            self.now += seconds / 10
            self.watchdog.check()


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_a_run_in_which_no_step_finishes_is_ended_with_its_stacks(run, capsys, tmp_path):
    run.train(1, 1, 1)
    run.reason = "sample 5 (a.jpg) has loaded for 290 s"
    run.watchdog.advance(Step())
    run.wait(299)
    assert not run.ended
    assert capsys.readouterr().err.count("no step has finished for ") == 1
    run.wait(2)
    code, message = run.ended[0]
    assert code == 75
    assert message.startswith("no step has finished for 300 s; sample 5 (a.jpg) has loaded for")
    assert message.endswith(f"the stacks of all threads are in {tmp_path / 'stacks.txt'}")
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "test_a_run_in_which_no_step_finishes" in stacks
    assert stacks.startswith("no step has finished for 30")


def test_slow_steps_have_ten_times_their_median(run):
    run.train(100, 100, 100, 900, 100)
    run.wait(999)
    assert not run.ended
    run.wait(2)
    assert run.ended


def test_the_first_step_has_as_long_as_a_compilation(run):
    run.watchdog.begin("compilation")
    run.wait(7000)
    run.train(7000)
    assert not run.ended
    run.watchdog.advance(Step())
    run.wait(70_001)
    assert run.ended


def test_evaluations_may_be_slow_but_not_endless(run, capsys):
    run.train(1)
    run.watchdog.begin("evaluation")
    run.wait(7199)
    assert not run.ended
    run.train(1)
    assert capsys.readouterr().err == ""
    run.watchdog.begin("evaluation")
    run.wait(7201)
    assert run.ended[0][1].startswith("the evaluation has not ended for 720")


def test_steps_that_were_started_ahead_count_when_they_finish(run):
    steps = [Step() for _ in range(50)]
    run.train(10)
    for step in steps:
        run.watchdog.advance(step)
    for step in steps:
        run.wait(10)
        step.done = True
    assert not run.ended
    run.watchdog.check()
    run.wait(299)
    assert not run.ended
    run.wait(2)
    assert run.ended


def test_stacks_that_cannot_be_written_do_not_keep_the_process(tmp_path):
    run = Run(tmp_path / "missing")
    run.train(1)
    run.wait(300)
    assert run.ended[0][0] == 75


def test_the_thread_ends_a_run_and_ends_with_the_block(tmp_path):
    ended = threading.Event()
    watchdog = Watchdog(
        tmp_path / "stacks.txt", lambda code, message: ended.set(), min_step_limit=0, other_limit=0
    )
    with watchdog:
        assert ended.wait(60)
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


TRAIN = """
import functools, sys
import train.run
from train import __main__ as command, peers
from train.watchdog import Watchdog

if __name__ == "__main__":
    train.run.Watchdog = functools.partial(Watchdog, min_step_limit=3, warn_after=1)
    sys.exit(peers.end_together(command.main))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_whose_data_worker_is_stopped_says_so_and_ends(tmp_path):
    config, script = tmp_path / "small.py", tmp_path / "main.py"
    config.write_text(CONFIG)
    script.write_text(TRAIN)
    command = [sys.executable, script, config, "--workdir", tmp_path / "run"]
    command += ["--set", "num_steps=100000", "data.workers=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": compilation.XLA_FLAGS}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    timer = threading.Timer(300, process.kill)
    timer.start()
    with process:
        while len(read_rows(tmp_path / "run" / "metrics.jsonl")) < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task").glob("*/children")
        pids = [int(pid) for path in children for pid in path.read_text().split()]
        (worker,) = [pid for pid in pids if "spawn_main" in read_command(pid)]
        os.kill(worker, signal.SIGSTOP)
        error = process.stderr.read()
    timer.cancel()
    assert process.returncode == 75, error
    lines = [line for line in error.splitlines() if line.startswith("train: ")]
    reason = f"process {worker}, which loads data, is stopped"
    assert len(lines) == 2, error
    assert all(line.startswith("train: no step has finished for ") for line in lines), error
    assert all(f" s; {reason}" in line for line in lines), error
    stacks = tmp_path / "run" / "stacks.txt"
    assert lines[-1].endswith(f"; the stacks of all threads are in {stacks}"), error
    assert "train_stage" in stacks.read_text()
    assert "Traceback" not in error
    wait_until(lambda: not is_alive(worker))


def read_command(pid):
    """Returns the command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text()
