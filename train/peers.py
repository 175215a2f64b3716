"""Ends the processes of a run together, with a line that says which of them failed.

JAX aborts all processes if one sends no heartbeats, but prints stack traces of C++ and a general
message. Therefore each process also tells the others once a second, through the key-value store of
JAX's coordination service, that it is alive or why it ends. While steps are trained, a process that
is silent ends the others before JAX does. At other times, when Python code may hold the
interpreter's lock for longer, only JAX does.

Process 0 hosts the service. If it is killed, the others abort at once, and the line comes last.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

# The client has no public name; orbax uses it in the same way.
from jax._src import distributed

from sam_jax.data.example import SourceError
from train.checkpoint_reading import CheckpointError
from train.config import ConfigError
from train.divergence import DivergedError
from train.preemption import Stopped, kill_children
from train.watchdog import RESTART_CODE

CRASH_CODE = 70  # the exit code after an unexpected error, EX_SOFTWARE in sysexits.h
STOPPED_CODES = (130, 143)  # after SIGINT and SIGTERM, which stop all processes at the same step

HEARTBEAT_TIMEOUT = 14  # seconds; JAX aborts after 7 to 14 seconds of silence
INTERVAL = 1.0  # seconds between two messages of a process
SILENCE_LIMIT = 6  # messages that a process may miss while steps are trained
SUSPICIOUS = 3  # missed messages after which a process is named if JAX aborts
BARRIER_LIMIT = 3600  # seconds in which all processes must be ready
LINGER = 2.0  # seconds for which process 0 stays, so that the others learn why it ends
FOLDER = "sam_jax/peers/"  # of the keys, one for each process
DONE = "done"  # the last message of a process that has trained all steps


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connects to the other processes of a run; see `jax.distributed.initialize`."""
    jax.distributed.initialize(
        coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
    )
    # A signal handler of Python would be run too late: when abort() returns, which it does not.
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


def wait_for_all_hosts(name: str) -> None:
    """Waits until every process of the run has called this function with the same name.

    A collective does the same, but those of CPUs give up after 30 seconds.
    """
    if client := distributed.global_state.client:
        client.wait_at_barrier(name, BARRIER_LIMIT * 1000)


class Peers:
    """The other processes of a run, as this process sees them.

    Attributes:
      processes: The number of processes.
      process: The index of this process.
      missed: How many messages each of the others has missed in a row.
    """

    def __init__(
        self, client: Any, process: int, processes: int, leave: Callable[[int, str], Any]
    ) -> None:
        """Makes the threads, which do not run yet.

        Args:
          client: The client of JAX's coordination service.
          process: The index of this process.
          processes: The number of processes.
          leave: Ends this process with an exit code and a message.
        """
        self.process, self.processes = process, processes
        self.missed: dict[int, int] = {}
        self._client, self._leave = client, leave
        self._count = 0  # of the messages of this process
        self._heard: dict[int, str] = {}  # the last message of each process
        self._unanswered = 0
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=[action], name=name, daemon=True)
            for action, name in ((self.exchange, "peers"), (self.check, "coordinator"))
        ]

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Tells the others that this process needs nothing from them any more."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._send(DONE)

    def exchange(self) -> None:
        """Sends a message, and receives those of the others. It hangs if process 0 is frozen."""
        try:
            self._count += 1
            self._send(str(self._count))
            received = self._client.key_value_dir_get(FOLDER)
        except jax.errors.JaxRuntimeError as error:
            if not self._stopped.is_set():
                reason = str(error).partition("\n")[0]
                self._leave(RESTART_CODE, f"{name_process(0)} cannot be reached: {reason}")
            return
        self._unanswered = 0
        for key, message in received:
            peer = int(key.rpartition("/")[2])
            if peer != self.process and message != DONE:
                self._hear(peer, message)

    def check(self) -> None:
        """Ends this process if process 0 has not answered for too long."""
        self._unanswered += 1
        if self._unanswered > SILENCE_LIMIT:
            self._leave(
                RESTART_CODE, f"{name_process(0)} has not answered for {self._unanswered} s"
            )

    def suspect(self) -> str:
        """Names the process that is most likely to have failed when JAX aborts."""
        peer = max(self.missed, key=lambda peer: self.missed[peer], default=0)
        if self.missed.get(peer, 0) >= SUSPICIOUS:
            return f"{name_process(peer)} has been silent for {self.missed[peer]} s"
        if self.process == 0:
            return "another process of the run has failed"
        return f"{name_process(0)} has ended, or another process of the run has failed"

    def _hear(self, peer: int, message: str) -> None:
        if message.startswith("{"):
            failure = json.loads(message)
            # All processes may have failed for the same reason, and this one is about to say so.
            self._stopped.wait(2 * INTERVAL)
            self._leave(failure["code"], f"process {peer} has failed: {failure['message']}")
            return
        self.missed[peer] = 0 if message != self._heard.get(peer) else self.missed[peer] + 1
        self._heard[peer] = message
        if self.missed[peer] > SILENCE_LIMIT:
            silence = f"{name_process(peer)} has been silent for {self.missed[peer]} s"
            self._leave(RESTART_CODE, f"{silence}: it was killed, or it is frozen")

    def _send(self, message: str) -> None:
        self._client.key_value_set(f"{FOLDER}{self.process}", message, allow_overwrite=True)

    def _repeat(self, action: Callable[[], None]) -> None:
        while not self._stopped.wait(INTERVAL):
            action()


_current: Peers | None = None
_leaving = threading.Lock()


@contextlib.contextmanager
def watch_peers() -> Iterator[None]:
    """Watches the other processes while the block runs. There must be no other work in it.

    If the block raises an error because another process failed, this process ends with a line that
    says so, before the error is printed.
    """
    global _current
    if jax.process_count() == 1:
        yield
        return
    client = distributed.global_state.client
    _current = Peers(client, jax.process_index(), jax.process_count(), leave)
    _current.start()
    try:
        yield
    except (CheckpointError, ConfigError, DivergedError, OSError, SourceError):
        raise
    except Exception:
        time.sleep(HEARTBEAT_TIMEOUT + 2 * INTERVAL)  # until a thread or JAX ends this process
        raise
    except Stopped:
        _current.finish()
        raise
    _current.finish()
    _current = None


def end_together(main: Callable[[], int]) -> int:
    """Runs a main function; if it fails, the other processes of the run end, too.

    Args:
      main: Returns an exit code.

    Returns:
      The exit code. After an unexpected error, it is 70.
    """
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except Exception:
        traceback.print_exc()
        code = CRASH_CODE
    if code and code not in STOPPED_CODES and jax.distributed.is_initialized():
        leave(code)
    return code


def leave(code: int, message: str = "") -> None:
    """Ends this process and its data workers, and tells the other processes of the run why.

    Python's own way to exit would wait for the other processes.

    Args:
      code: The exit code.
      message: A message to print; none if it was printed.
    """
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()  # another thread ends the process
    if message:
        print(f"\ntrain: {message}", file=sys.stderr)  # on a new line after the progress bar
    kill_children()
    if client := distributed.global_state.client:
        note = json.dumps({"code": code, "message": message or "see its output"})
        key = f"{FOLDER}{distributed.global_state.process_id}"
        arguments = {"key": key, "value": note, "allow_overwrite": True}
        # Process 0 may be frozen.
        sender = threading.Thread(target=client.key_value_set, kwargs=arguments, daemon=True)
        sender.start()
        sender.join(INTERVAL)
        if distributed.global_state.process_id == 0:
            time.sleep(LINGER)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def name_process(process: int) -> str:
    """Returns the name of a process in messages."""
    return f"process {process}" + (", which coordinates the run," if process == 0 else "")


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """Ends the process with a message when JAX aborts it."""
    process = distributed.global_state.process_id
    peers = _current or Peers(None, process, distributed.global_state.num_processes, leave)
    os.write(2, f"train: {peers.suspect()}\n".encode())
    kill_children()
    os._exit(RESTART_CODE)
