"""Runs a reader on mutated files, under limits of time and memory, and watches what it executes."""

import contextlib
import random
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.mutators import mutate_bytes

# Events of the interpreter that no reader may cause.
EXECUTIONS = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "os.startfile"}
EXECUTIONS |= {"subprocess.Popen", "pickle.find_class", "ctypes.dlopen", "socket.connect"}
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Target:
    """A reader, and a valid file to mutate.

    Attributes:
      name: Name of the reader, and of the kind of file.
      seed: The content of a valid file.
      read: Reads such content.
      errors: What `read` raises for content that it refuses.
      mutate: Returns mutated content.
    """

    name: str
    seed: bytes
    read: Callable[[bytes], object]
    errors: tuple[type[Exception], ...] = (ValueError,)
    mutate: Callable[[bytes, random.Random], bytes] = mutate_bytes


@dataclass
class Result:
    """What became of the mutated files of one target.

    Attributes:
      name: The target.
      read: Number of files that were read.
      refused: Number of files that raised a documented error.
      seconds: The longest time for a file.
      memory: The most bytes that a file added to the memory of the process.
      faults: One text for each file that did something else.
    """

    name: str
    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    memory: int = 0
    faults: list[str] = field(default_factory=list)


class Hang(BaseException):
    """A reader that does not return. No reader catches it."""


def fuzz(
    target: Target,
    count: int,
    *,
    seed: int = 0,
    max_seconds: float = 30.0,
    max_memory: int = 1 << 30,
) -> Result:
    """Reads mutated files.

    Args:
      target: What to read.
      count: The number of files.
      seed: Each (seed, index) has its own file, so that a fault can be repeated.
      max_seconds: The time after which a reader is interrupted.
      max_memory: Bytes that reading a file may add to the memory of the process.

    Returns:
      The counts, and the faults: executions, hangs, warnings, undocumented errors, and too much
      memory.
    """
    target.read(target.seed)  # valid; and loads what is loaded once
    result = Result(target.name)
    for index in range(count):
        data = target.mutate(target.seed, random.Random(f"{target.name} {seed} {index}"))
        before, executed = _memory("VmRSS", reset=True), _watch()
        start = time.perf_counter()
        try:
            with _alarm(max_seconds), warnings.catch_warnings(action="error"):
                target.read(data)
            result.read += 1
        except target.errors:
            result.refused += 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"[:300]
            result.faults.append(f"{target.name}, file {index}: {text}")
        added = _memory("VmHWM") - before
        result.seconds = max(result.seconds, time.perf_counter() - start)
        result.memory = max(result.memory, added)
        if executed:
            result.faults.append(f"{target.name}, file {index}: executed {executed}")
        if added > max_memory:
            result.faults.append(f"{target.name}, file {index}: took {added >> 20} MiB")
    return result


_executed: list[str] = []
_is_watching = False


def _watch() -> list[str]:
    """Returns a list to which forbidden events are appended from now on."""
    global _executed, _is_watching
    _executed = []
    if not _is_watching:
        sys.addaudithook(lambda event, _: event in EXECUTIONS and _executed.append(event))
        _is_watching = True
    return _executed


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises Hang in the block after some seconds, where there are such signals."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        raise Hang(f"not read within {seconds} s")

    former = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def _memory(name: str, *, reset: bool = False) -> int:
    """Returns the resident bytes of this process, or their peak; 0 where Linux does not tell."""
    if not STATUS.exists():
        return 0
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0
