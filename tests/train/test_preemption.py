"""Runs that are stopped by signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.train.running import ROOT
from train.preemption import Stopped, StopSignals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_raised_only_where_it_is_not_deferred(signum):
    before = signal.getsignal(signum), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signals = StopSignals()
    with signals.installed():
        with pytest.raises(Stopped) as caught, signals.deferred():  # noqa: PT012
            assert not signals.reached(1)
            os.kill(os.getpid(), signum)
            while not signals.reached(2):
                time.sleep(0.001)
            with pytest.raises(Stopped), signals.interruptible():
                pytest.fail("the signal was received before")
        with pytest.raises(Stopped), signals.interruptible():
            pytest.fail("the signal was received before")
    assert caught.value.exit_code == 128 + signum
    assert str(signals.stopped(7)) == (
        f"stopped at step 7 by {signal.Signals(signum).name}; the same command resumes"
    )
    assert before == (signal.getsignal(signum), signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_a_signal_ends_what_can_be_interrupted():
    signals = StopSignals()
    with signals.installed(), pytest.raises(Stopped):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    signals = StopSignals()
    with signals.installed(), pytest.raises(Stopped), signals.deferred():  # noqa: PT012
        with pytest.raises(Stopped), signals.interruptible():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        assert signals.reached(1)


SECOND_SIGNAL = """
import multiprocessing, os, signal, time
from train.preemption import StopSignals

if __name__ == "__main__":
    signals = StopSignals()
    with signals.installed(), signals.deferred():
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        child.start()
        print(child.pid, flush=True)
        for signum in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)
            while signals.received is None:
                time.sleep(0.001)
        child.join()
"""


def test_a_first_signal_is_explained_and_a_second_one_ends_the_process_and_its_children(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SECOND_SIGNAL)
    process = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 130
    assert process.stderr == (
        "\ntrain: SIGTERM stops the run after this step, which is saved; a second signal ends it "
        "at once\n\ntrain: ended by a second signal, SIGINT, without a checkpoint\n"
    )
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{process.stdout.strip()}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{process.stdout.strip()}")
