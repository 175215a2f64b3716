"""Tests of restarts, with fake runs and with small processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train import supervise as supervisor
from train.supervise import main, newest_checkpoint, supervise

ROOT = Path(__file__).resolve().parents[2]


def attempts(codes, steps=None, max_failures=3):
    """Returns the exit code, and the seconds before each restart."""
    codes, steps, waits = iter(codes), iter(steps or [0] * len(codes)), []
    code = supervise(lambda: next(codes), lambda: next(steps), max_failures, waits.append)
    return code, waits


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_final_exit_codes_are_passed_on(code):
    assert attempts([code]) == (code, [])


@pytest.mark.parametrize("code", [-9, -6, -11, 70, 75, 134])
def test_runs_that_crash_are_started_again(code):
    assert attempts([code, 0]) == (0, [5])


def test_it_gives_up_after_repeated_failures_at_one_step(capsys):
    assert attempts([75, 75, -9], [100, 100, 100]) == (137, [5, 10])
    assert "newest checkpoint is of step 100, as in the last 3 attempts" in capsys.readouterr().err


def test_progress_resets_the_failures():
    codes, steps = [75] * 8 + [0], [0, 0, 50, 50, 100, 150, 150, 200]
    assert attempts(codes, steps) == (0, [5, 10, 5, 10, 5, 5, 10, 5])


def test_waits_are_bounded():
    _, waits = attempts([75] * 12, max_failures=12)
    assert waits[-1] == 300


def test_a_signal_during_a_wait_ends_it():
    assert supervise(lambda: 75, lambda: 0, 3, lambda seconds: 143) == 143


def test_the_newest_checkpoint_is_read_from_the_workdir(tmp_path):
    assert newest_checkpoint(str(tmp_path)) == 0
    for name in ("90", "100", "110.orbax-checkpoint-tmp", "damaged_120"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(f"{tmp_path}/") == 100


def test_wrong_usage_is_an_error(capsys):
    for arguments in (["config.py"], ["--max-failures", "0", "config.py", "--workdir", "w"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2


def test_arguments_are_passed_to_the_training(monkeypatch):
    commands = []
    monkeypatch.setattr(supervisor.Child, "run", lambda child: commands.append(child._command) or 0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    run = ["-m", "train", "c.py", "--set", "a=1", "--workdir", "w"]
    assert main(["--max-failures", "2", "--", "c.py", "--workdir", "w", "--set", "a=1"]) == 0
    assert main(["c.py", "--set", "a=1", "--workdir", "w"]) == 0
    assert [command[1:] for command in commands] == [run, run]


CHILD = """
import signal, sys, time
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("started", flush=True)
while True:
    time.sleep(0.01)
"""

SUPERVISE = """
import signal, sys
from train.supervise import Child, supervise
child = Child([sys.executable, "-c", sys.argv[1]])
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: child.send(number))
sys.exit(supervise(child.run, lambda: 0, 3, child.wait))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_once(number):
    command = [sys.executable, "-c", SUPERVISE, CHILD]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline() == "started\n"
        os.killpg(process.pid, number)  # as Ctrl-C in a terminal
        assert process.stdout.read() == "saved\n"
        assert process.wait() == 128 + number
