"""Locks that end with the process that holds them, however it ends.

A lock is an advisory lock of the operating system on a small file. A killed process leaves the file
but not the lock, so that nothing has to be cleaned up. Where the operating system or the file
system has no such locks (Windows, some network file systems), nothing is guarded.
"""

import contextlib
import datetime
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl


class LockedError(OSError):
    """Something that another process uses; the message says which process."""


@contextlib.contextmanager
def exclusive_lock(path: str | os.PathLike[str], name: str) -> Iterator[None]:
    """Holds a lock while the block runs.

    Args:
      path: The lock file, whose folder must exist. It is removed at the end.
      name: The name of the guarded file or folder, for the error message.

    Raises:
      LockedError: If another process holds the lock.
      OSError: If the file cannot be created.
    """
    path = Path(path)
    file = _open_locked(path)
    if file is None:
        raise LockedError(f"{name} is in use by {_read_holder(path)}")
    with file:
        file.truncate(0)
        file.write(_describe_this_process().encode())
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is locked; see `_open_locked`


def is_locked(path: str | os.PathLike[str]) -> bool:
    """Returns True if a process holds the lock."""
    try:
        with open(path, "rb") as file:
            return not _try_lock(file)
    except FileNotFoundError:
        return False


def _open_locked(path: Path) -> BinaryIO | None:
    """Opens and locks a file; returns None if another process has locked it."""
    while True:
        file = open(path, "a+b")  # noqa: SIM115 - the caller closes it
        if not _try_lock(file):
            file.close()
            return None
        # The last holder may have removed the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def _try_lock(file: BinaryIO) -> bool:
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Other errors mean that the file system has no locks.
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _describe_this_process() -> str:
    now = datetime.datetime.now(datetime.UTC)
    return f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S} UTC"


def _read_holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace") or "another process"
    return "another process"
