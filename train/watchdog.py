"""Ends a run in which no step finishes, so that it can be restarted from its last checkpoint.

A thread looks once a second at the steps that are on the devices. The training loop only hands it
the values of each step, which takes less than a microsecond.
"""

import collections
import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

RESTART_CODE = 75  # the exit code that asks for a restart, EX_TEMPFAIL in sysexits.h

MIN_STEP_LIMIT = 300.0  # seconds without a finished step
STEP_FACTOR = 10  # the limit in median steps, if that is longer
OTHER_LIMIT = 7200.0  # seconds for a compilation, an evaluation or a save
WARN_AFTER = 60.0  # seconds without a finished step until the first message
NUM_RECENT = 101  # steps whose median counts
WRITE_LIMIT = 10.0  # seconds to write the stacks, for which the disk may be what hangs

Exit = Callable[[int, str], None]


class Watchdog:
    """Watches the steps of a run on this host.

    It is a context manager that is left when the last step is done.

    Attributes:
      stacks: The file to which the stacks of all threads are written before the process ends.
      describe: Says what the run may be waiting for; "" if it does not know.
    """

    def __init__(
        self,
        stacks: Path,
        leave: Exit,
        *,
        min_step_limit: float = MIN_STEP_LIMIT,
        other_limit: float = OTHER_LIMIT,
        warn_after: float = WARN_AFTER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes a watchdog, which is idle until it is entered.

        Args:
          stacks: The file for the stacks.
          leave: Ends the process with an exit code, and a message that is printed.
          min_step_limit: Seconds without a finished step after which the process ends, or ten
            median steps if they take longer.
          other_limit: Seconds that a compilation, an evaluation or a save may take.
          warn_after: Seconds without a finished step after which a message is printed.
          clock: The time in seconds.
        """
        self.stacks = stacks
        self.describe: Callable[[], str] = str
        self._leave, self._clock = leave, clock
        self._min_step_limit, self._other_limit = min_step_limit, other_limit
        self._warn_after = warn_after
        self._activity = "compilation"
        self._running: collections.deque[Any] = collections.deque()  # values of unfinished steps
        self._durations: collections.deque[float] = collections.deque(maxlen=NUM_RECENT)
        self._last = clock()  # when the last step finished, or the activity began
        self._has_warned = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def begin(self, activity: str) -> None:
        """Allows more time for something that is done between two steps.

        Args:
          activity: Its name in messages: "compilation", "evaluation" or "save".
        """
        self._activity, self._last, self._has_warned = activity, self._clock(), False

    def advance(self, values: Any) -> None:
        """Counts a step, which may still run.

        Args:
          values: An array that the step returns.
        """
        self._running.append(values)
        if self._activity:
            self._activity, self._last = "", self._clock()

    def check(self) -> None:
        """Looks at the steps; warns, or ends the process, if none has finished for too long."""
        now, finished = self._clock(), 0
        while self._running and self._running[0].is_ready():
            self._running.popleft()
            finished += 1
        if finished:
            self._durations.extend([(now - self._last) / finished] * finished)
            self._last, self._has_warned = now, False
        waited = now - self._last
        if waited >= self._limit():
            self._end(waited)
        elif waited >= self._warn_after and not self._activity and not self._has_warned:
            self._has_warned = True
            # On a new line, after the progress bar.
            print(f"\ntrain: {self._message(waited)}", file=sys.stderr, flush=True)

    def _limit(self) -> float:
        if self._activity or not self._durations:  # nobody knows how long the first step takes
            return self._other_limit
        return max(STEP_FACTOR * statistics.median(self._durations), self._min_step_limit)

    def _message(self, waited: float) -> str:
        what = f"the {self._activity} has not ended" if self._activity else "no step has finished"
        reason = self.describe()
        return f"{what} for {waited:.0f} s" + (f"; {reason}" if reason else "")

    def _end(self, waited: float) -> None:
        message = self._message(waited)
        writer = threading.Thread(target=self._write_stacks, args=[message], daemon=True)
        writer.start()
        writer.join(WRITE_LIMIT)
        self._leave(RESTART_CODE, f"{message}; the stacks of all threads are in {self.stacks}")

    def _write_stacks(self, message: str) -> None:
        with contextlib.suppress(OSError), open(self.stacks, "w", encoding="utf-8") as file:
            print(message, file=file, flush=True)
            faulthandler.dump_traceback(file)

    def _watch(self) -> None:
        while not self._stopped.wait(1.0):
            self.check()

    def __enter__(self) -> "Watchdog":
        self._last = self._clock()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()
