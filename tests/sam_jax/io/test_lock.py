"""Tests of locks between processes."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from sam_jax.io.lock import LockedError, exclusive_lock, is_locked

HOLD = """
import sys
from sam_jax.io.lock import exclusive_lock
with exclusive_lock(sys.argv[1], "the folder"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock `.lock`."""
    command = [sys.executable, "-c", HOLD, tmp_path / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_rejected_and_told_who_holds_the_lock(holder, tmp_path):
    path = tmp_path / ".lock"
    message = f"the folder is in use by process {holder.pid} on .+ since 2.+ UTC"
    with pytest.raises(LockedError, match=message), exclusive_lock(path, "the folder"):
        pytest.fail("two processes hold the lock")
    assert is_locked(path)
    assert f"process {holder.pid} " in path.read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_killed_process_is_free(holder, tmp_path, number):
    path = tmp_path / ".lock"
    holder.send_signal(number)
    holder.wait()
    assert path.exists()
    assert not is_locked(path)
    with exclusive_lock(path, "the folder"):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert not path.exists()


def test_the_file_is_removed_also_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), exclusive_lock(tmp_path / ".lock", "the folder"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    assert not is_locked(tmp_path / ".lock")


def test_of_many_threads_one_holds_the_lock_at_a_time(tmp_path):
    holding, most, acquired = [], [], []

    def work(number):
        for _ in range(200):
            try:
                with exclusive_lock(tmp_path / ".lock", "the folder"):
                    holding.append(number)
                    most.append(len(holding))
                    acquired.append(number)
                    holding.remove(number)
            except LockedError:
                pass

    threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert acquired
    assert max(most) == 1


def test_a_file_system_without_locks_guards_nothing(monkeypatch, tmp_path):
    def no_locks(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with exclusive_lock(tmp_path / ".lock", "one"), exclusive_lock(tmp_path / ".lock", "two"):
        pass
