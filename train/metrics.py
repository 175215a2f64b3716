"""The log of a run: JSON lines, TensorBoard events and a progress bar."""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from sam_jax.io.atomic import write_bytes

T = TypeVar("T")


class Metrics:
    """Writes the values of logged steps, and of evaluations during the run.

    `metrics.jsonl` has one object per logged step, `evaluations.jsonl` one per evaluation. A
    resumed run first drops the rows after its checkpoint, so that no step occurs twice.
    """

    def __init__(
        self,
        workdir: Path,
        start: int,
        stop: int,
    ) -> None:
        """Opens the files.

        Args:
          workdir: The folder of the run.
          start: The number of steps done.
          stop: The number of steps of the run.
        """
        from tensorboardX import SummaryWriter

        self.path = workdir / "metrics.jsonl"
        self.evaluations = workdir / "evaluations.jsonl"
        for path in (self.path, self.evaluations):
            drop_rows_after(path, start)
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(total=stop, initial=start, unit="step", dynamic_ncols=True)
        self.batch_size = 1
        self.peak_step_seconds: float | None = None
        self._last_log = (time.perf_counter(), start)
        self._waited = 0.0

    def begin_stage(self, batch_size: int, peak_step_seconds: float | None = None) -> None:
        """Sets what the speed is measured by.

        Args:
          batch_size: Images per step.
          peak_step_seconds: Seconds per step at the devices' peak FLOP/s, if that is known.
        """
        self.batch_size, self.peak_step_seconds = batch_size, peak_step_seconds

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
        """Moves the progress bar by one step."""
        self.bar.update()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Writes the values of a step.

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
        append_row(self.path, {"step": step} | values | speed)
        for name, value in (values | speed).items():
            if isinstance(value, float):
                self.board.add_scalar(name, value, step)
        self.board.flush()
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in bar.items() if v is not None})

    def log_evaluation(self, step: int, evaluation: dict[str, Any]) -> None:
        """Writes an evaluation.

        Args:
          step: The number of steps done.
          evaluation: Values by name, which may be nested. TensorBoard gets the floats.
        """
        append_row(self.evaluations, {"step": step} | evaluation)
        for name, value in flatten_dict(evaluation, sep="/").items():
            if isinstance(value, float):
                self.board.add_scalar(f"evaluation/{name}", value, step)

    def close(self) -> None:
        """Closes the files and the progress bar."""
        self.board.close()
        self.bar.close()


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends a row to a JSON lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def drop_rows_after(path: Path, step: int) -> None:
    """Removes the rows of later steps from a JSON lines file, if there is one."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    if rows:
        write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    else:
        path.unlink(missing_ok=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads a JSON lines file; a missing file has no rows, and a truncated last row is skipped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


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
