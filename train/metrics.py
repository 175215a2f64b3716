"""The log of a run: JSON lines, TensorBoard events and a progress bar."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from train.rows import Row, append_row, drop_rows_after, read_rows

T = TypeVar("T")

SECONDS_PER_LINE = 20

log = logging.getLogger("train")


class Metrics:
    """Writes the values of logged steps, and of evaluations during the run.

    `metrics.jsonl` has one object per logged step, `evaluations.jsonl` one per evaluation. A
    resumed run first drops the rows after its checkpoint, so that no step occurs twice.

    A terminal shows a progress bar. In other output there is a line instead, for the logged steps
    that are at least SECONDS_PER_LINE apart.

    If values cannot be written, for instance because the disk is full, they are lost, but the run
    goes on.
    """

    def __init__(
        self,
        workdir: Path,
        start: int,
        stop: int,
    ) -> None:
        """Drops later rows from the files and shows the progress bar.

        Args:
          workdir: The folder of the run, which must exist.
          start: The number of steps done.
          stop: The number of steps of the run.
        """
        # This imports PyTorch where it is installed, which takes a second.
        from train.board import Board

        self.path = workdir / "metrics.jsonl"
        self.evaluations = workdir / "evaluations.jsonl"
        for path in (self.path, self.evaluations):
            drop_rows_after(path, start)
        self.board = Board(workdir / "tensorboard", start)
        self.stop = stop
        self.bar = tqdm(total=stop, initial=start, unit="step", dynamic_ncols=True, disable=None)
        self.batch_size = 1
        self.peak_step_seconds: float | None = None
        self._last_log = (time.perf_counter(), start)
        self._last_line = -math.inf
        self._waited = 0.0
        self._is_failing = False
        self._is_first_step = True

    def begin_stage(self, batch_size: int, peak_step_seconds: float | None = None) -> None:
        """Sets the units of the speed for the steps that follow.

        Args:
          batch_size: Images per step.
          peak_step_seconds: Seconds per step at the devices' peak FLOP/s, if that is known.
        """
        self.batch_size, self.peak_step_seconds = batch_size, peak_step_seconds
        self._is_first_step = True

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches and measures the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def advance(self) -> None:
        """Moves the progress bar by one step.

        The bar does not count the first step of a stage, which includes the compilation, in the
        speed that it predicts the end by.
        """
        if self._is_first_step:
            self._is_first_step = False
            self.bar.unpause()
        self.bar.update()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Writes the values of a step, and the speed since the row before.

        The time between two rows includes that of evaluations, checkpoints and compilation.

        Args:
          step: The number of steps done.
          values: Numbers, or lists of one number per round.
        """
        now = time.perf_counter()
        last_time, last_step = self._last_log
        step_seconds = (now - last_time) / (step - last_step)
        images_per_second = self.batch_size / step_seconds
        speed = {
            "images_per_second": round(images_per_second, 2),
            "step_seconds": round(step_seconds, 5),
            "waiting_for_data": round(self._waited / (now - last_time), 4),  # fraction of the time
        }
        bar = {"loss": values["loss"], "mIoU": values.get("miou"), "images/s": images_per_second}
        if self.peak_step_seconds:
            speed["mfu"] = round(self.peak_step_seconds / step_seconds, 4)
            bar["MFU"] = speed["mfu"]
        self._last_log, self._waited = (now, step), 0.0
        self._write(self.path, step, values | speed, values | speed)
        texts = {name: f"{value:.3g}" for name, value in bar.items() if value is not None}
        if not self.bar.disable:
            self.bar.set_postfix(texts)
        elif now - self._last_line > SECONDS_PER_LINE or step == self.stop:
            self._last_line = now
            described = ", ".join(f"{name} {text}" for name, text in texts.items())
            log.info("step %d of %d: %s", step, self.stop, described)

    def has_evaluation(self, step: int) -> bool:
        """Returns whether the evaluation after a step was written."""
        return any(row["step"] == step for row in read_rows(self.evaluations))

    def log_evaluation(self, step: int, evaluation: dict[str, Any]) -> None:
        """Writes an evaluation.

        Args:
          step: The number of steps done.
          evaluation: Values by name, which may be nested. TensorBoard gets the floats.
        """
        scalars = flatten_dict({"evaluation": evaluation}, sep="/")
        self._write(self.evaluations, step, evaluation, scalars)

    def close(self) -> None:
        """Closes the progress bar."""
        self.bar.close()

    def _write(self, path: Path, step: int, row: Row, scalars: dict[str, Any]) -> None:
        """Writes a row to a JSON lines file and scalars to TensorBoard, if that is possible."""
        was_failing, self._is_failing = self._is_failing, False
        for write in (
            lambda: append_row(path, {"step": step} | row),
            lambda: self.board.write(step, scalars),
        ):
            try:
                write()
            except OSError as error:
                if not was_failing and not self._is_failing:
                    log.warning("metrics cannot be written, the run goes on: %s", error)
                self._is_failing = True


def summarize(values: dict[str, Any]) -> dict[str, Any]:
    """Averages the values of a step over rounds.

    Args:
      values: Numpy arrays: one number per round for those of the objective, single numbers for
        those of the step.

    Returns:
      Means by name, without "round_loss", whose mean is the loss. "miou_of_rounds" lists the mean
      IoU of each round, if there is one.
    """
    row: dict[str, Any] = {
        name: float(np.mean(value)) for name, value in values.items() if name != "round_loss"
    }
    if "miou" in values:
        row["miou_of_rounds"] = [round(float(x), 4) for x in values["miou"]]
    return row
