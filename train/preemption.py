"""Signals that stop a run: SIGTERM, which also announces a preemption, and SIGINT (Ctrl-C).

The first signal stops a run after the step in progress, on all hosts after the same step. Several
hosts agree on it through JAX's preemption service. The second signal ends the process at once.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The end of a run that a signal stopped.

    It is not an `Exception`, so that nothing handles it as an error.

    Attributes:
      exit_code: The exit code of the process, 128 plus the number of the signal.
    """

    def __init__(self, signum: int, step: int | None = None) -> None:
        """Makes the message.

        Args:
          signum: The signal.
          step: The number of steps done, if a checkpoint of them was saved.
        """
        where = "" if step is None else f"at step {step} "
        name = signal.Signals(signum).name
        super().__init__(f"stopped {where}by {name}; the same command resumes")
        self.exit_code = 128 + signum


class StopSignals:
    """Records the signals that this process receives.

    Outside of `installed`, Python's handlers stay. A signal then stops a run on several hosts only,
    by JAX's own handler.

    Attributes:
      received: The first signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_deferred = False
        self._notify_jax: Callable[[int], None] | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handles signals inside the block: raises `Stopped` where they are not deferred.

        Python's handlers run in the main thread, but not while it is inside of XLA, for instance
        to compile or to wait for another host. A thread therefore watches for the second signal.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        wakeup_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        handlers = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        try:
            yield
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            signal.set_wakeup_fd(wakeup_fd)
            os.close(writer)

    def connect(self) -> None:
        """Forwards signals to JAX's preemption service, after `jax.distributed.initialize`.

        The service has replaced the handler of SIGTERM by a function in C, which Python can neither
        return nor restore. Signals are deferred until the hosts can agree on a step.
        """
        get_handler = ctypes.pythonapi.PyOS_getsig
        get_handler.restype = ctypes.c_void_p
        self._notify_jax = ctypes.CFUNCTYPE(None, ctypes.c_int)(get_handler(signal.SIGTERM))
        self._is_deferred = True
        signal.signal(signal.SIGTERM, self._handle)

    def reached(self, step: int) -> bool:
        """Returns whether the run must stop now, on all hosts after the same step.

        Args:
          step: The number of steps done. All hosts must call this function after every step.
        """
        if jax.process_count() == 1:
            return self.received is not None
        return multihost_utils.reached_preemption_sync_point(step)

    def stopped(self, step: int) -> Stopped:
        """Returns the end of a run at a step whose checkpoint was saved."""
        return Stopped(self.received or signal.SIGTERM, step)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only records signals inside the block, which calls `reached`.

        Processes that are started in the block do not receive the signals. A terminal sends SIGINT
        to them as well, and a shutdown SIGTERM, but they are needed until the run has stopped.
        """
        before, self._is_deferred = self._is_deferred, True
        # When Python starts this process, with the first other process, it unblocks the signals.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._is_deferred = before
        if self.received and not before:
            raise Stopped(self.received)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises `Stopped` at a signal inside the block, even where signals are deferred.

        Raises:
          Stopped: If a signal was received, before or inside the block.
        """
        before, self._is_deferred = self._is_deferred, False
        mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            if self.received:
                raise Stopped(self.received)
            yield
        finally:
            self._is_deferred = before
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """Handles a signal in the main thread."""
        if self.received is None:
            self.received = signum
            if not self._is_deferred:
                raise Stopped(signum)

    def _watch(self, reader: int) -> None:
        """Handles the signals whose numbers are written to a pipe.

        The first one is forwarded to JAX, and the user is told what happens next. The second one
        ends the process.
        """
        with open(reader, "rb", buffering=0) as pipe:
            if (first := pipe.read(1)) and self._notify_jax:
                self._notify_jax(first[0])
            if first and self._is_deferred:
                os.write(2, f"\ntrain: {_describe_stop(first[0])}\n".encode())
            if not (second := pipe.read(1)):
                return
        name = signal.Signals(second[0]).name
        os.write(2, f"\ntrain: ended by a second signal, {name}, without a checkpoint\n".encode())
        kill_children()
        os._exit(128 + second[0])


def _describe_stop(signum: int) -> str:
    name = signal.Signals(signum).name
    return f"{name} stops the run after this step, which is saved; a second signal ends it at once"


def kill_children() -> None:
    """Kills the processes that load data, which do not receive the signals of `SIGNALS`."""
    for process in multiprocessing.active_children():
        process.kill()
