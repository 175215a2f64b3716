"""Limits the memory of the images that the threads of a process decode at the same time."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator

TRIMMED_SHARE = 1 / 8  # of the limit, for which the time to trim the heaps does not matter


class PixelBudget:
    """A number of pixels that threads share.

    Args:
      limit: The number of pixels. A larger request is granted when there is no other.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._thread = threading.local()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Returns what this thread acquires in the block only at the end of the block."""
        if hasattr(self._thread, "held"):  # the outer block returns it
            yield
            return
        self._thread.held = 0
        try:
            yield
        finally:
            if self._thread.held > self._limit * TRIMMED_SHARE:
                _trim_heaps()
            with self._changed:
                self._used -= self._thread.held
                self._changed.notify_all()
            del self._thread.held

    @contextlib.contextmanager
    def acquire(self, pixels: int) -> Iterator[None]:
        """Waits until pixels are free, and uses them in the block.

        A thread that holds pixels already does not wait, since two such threads could wait for each
        other.

        Args:
          pixels: The number of pixels.
        """
        pixels = min(pixels, self._limit)
        with self.hold():
            if self._thread.held:
                with self._changed:
                    self._take(pixels)
            else:
                # One thread waits here and the others wait for their turn, so that many small
                # requests cannot overtake a large one forever.
                with self._turn, self._changed:
                    self._changed.wait_for(lambda: self._used + pixels <= self._limit)
                    self._take(pixels)
            yield

    def _take(self, pixels: int) -> None:
        self._used += pixels
        self._thread.held += pixels


def _trim_heaps() -> None:
    """Returns free memory to the operating system.

    The C library of Linux has a heap for each thread, and would keep the blocks in which Pillow
    decoded a large image. Other C libraries have no such function, or another allocator.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
