"""Helpers for tests that look at other processes."""

import time
from pathlib import Path


def is_alive(pid):
    """Returns False for processes that ended, also if their parent has not noticed it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    """Waits until a function returns True, for at most a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
