"""A profiler's trace of some steps of a run."""

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces the steps from a first to a last one, and writes the trace to a folder.

    A run that is resumed among these steps traces the rest of them.
    """

    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        """Sets what is traced.

        Args:
          folder: The folder to write to.
          steps: The first and the last step of the trace; empty for no trace.
        """
        self._folder, self._steps = folder, steps
        self._is_tracing = False

    def begin_step(self, step: int) -> None:
        """Starts the trace if the step belongs to it."""
        if self._steps and not self._is_tracing and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(self._folder)
            self._is_tracing = True

    def end_step(self, step: int, values: Any) -> None:
        """Ends the trace after its last step.

        Args:
          step: The step.
          values: Its results. The trace ends when they are computed.
        """
        if self._is_tracing and step >= self._steps[1]:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Ends the trace if there is one."""
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
