"""The threads and processes that load batches ahead: what they wait for, and how they end."""

import contextlib
import functools
import multiprocessing
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sam_jax.data.example import SourceError

WORKER_NAME = "grain-process-prefetch"  # how the names of grain's processes begin
WORKER_DIED = "Worker process was terminated"  # how grain's error begins
# What a slot of `SamplesInProgress` holds. The start is 0 if nothing is loaded.
SLOT = np.dtype([("index", np.int64), ("start", np.float64)])


class SamplesInProgress:
    """The samples that are being loaded, in a file that all workers of a host map to memory.

    Attributes:
      path: The file.
      close: Deletes the file. This is also done when the object is deleted or the process ends.
    """

    def __init__(self, num_slots: int) -> None:
        """Creates the file.

        Args:
          num_slots: More than the distance of any two rows that are loaded at a time.
        """
        descriptor, self.path = tempfile.mkstemp(prefix="sam_jax_samples_")
        os.truncate(descriptor, num_slots * SLOT.itemsize)
        os.close(descriptor)
        self.close = weakref.finalize(self, os.unlink, self.path)

    def oldest(self) -> tuple[int, float] | None:
        """Returns the index of the sample that takes longest, and its start; None if there is none.

        The start is a time of `time.monotonic`, which all processes share.
        """
        slots = _slots(self.path)
        busy = slots[slots["start"] > 0]
        if not len(busy):
            return None
        slot = busy[np.argmin(busy["start"])]
        return int(slot["index"]), float(slot["start"])


@functools.lru_cache(maxsize=4)
def _slots(path: str) -> np.ndarray:
    return np.memmap(path, SLOT, "r+")


@contextlib.contextmanager
def reporting(path: str, row: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that reports which sample is being loaded, until the block ends.

    Args:
      path: The path of the `SamplesInProgress`.
      row: The row of the batches that the sample is for.
    """
    slots = _slots(path)
    slot = row % len(slots)

    def report(index: int) -> None:
        slots[slot] = (index, time.monotonic())

    try:
        yield report
    finally:
        slots[slot] = (0, 0.0)


class Batches(Iterator[Any]):
    """An iterator over batches that are loaded ahead by threads or processes.

    It should be closed, so that the workers end. They also end with this process.
    """

    def __init__(
        self, batches: Any, samples: SamplesInProgress, name: Callable[[int], str]
    ) -> None:
        """Wraps the iterator of grain.

        Args:
          batches: The iterator.
          samples: Where its workers report what they load.
          name: Returns the name of a sample, by its index.
        """
        self._batches, self._samples, self._name = batches, samples, name

    def __next__(self) -> Any:
        """Returns the next batch.

        Raises:
          SourceError: If a worker died.
        """
        try:
            return next(self._batches)
        except RuntimeError as error:
            if not str(error).startswith(WORKER_DIED):
                raise
            _kill(_workers())
            raise SourceError(
                "a process that loads data (data.workers) was killed; if nobody did so, the memory "
                "was full, and fewer workers need less"
            ) from error

    def describe(self) -> str:
        """Says which sample takes longest, and which workers are stopped; "" if there is none."""
        reasons = [
            f"process {process.pid}, which loads data, is stopped"
            for process in _workers()
            if _state(process) == "T"
        ]
        if oldest := self._samples.oldest():
            index, start = oldest
            seconds = time.monotonic() - start
            reasons.append(f"sample {index} ({self._name(index)}) has loaded for {seconds:.0f} s")
        return "; ".join(reasons)

    def close(self) -> None:
        """Ends the workers."""
        stopped = [process for process in _workers() if _state(process) == "T"]
        _kill(stopped)  # they could not end by themselves
        if hasattr(self._batches, "close"):
            self._batches.close()
        self._samples.close()


def end_with_parent(worker: int, num_workers: int) -> None:
    """Ends this worker process when the process that started it has ended, even if it was killed.

    Args:
      worker: The index of the worker.
      num_workers: The number of workers.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, name=f"parent of {worker} of {num_workers}", daemon=True).start()


def _workers() -> list[Any]:
    """Returns the processes of grain that this process has started."""
    children = multiprocessing.active_children()
    return [child for child in children if child.name.startswith(WORKER_NAME)]


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()


def _state(process: Any) -> str:
    """Returns the state of a process as in ps(1), where "T" means stopped; "" if unknown."""
    with contextlib.suppress(OSError):
        # After the name, which may hold spaces and parentheses.
        status = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
        return status.rpartition(")")[2].split()[0]
    return ""
