"""What a run says of itself while it runs: JSON lines, TensorBoard events, a progress bar."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm


class Metrics:
    """Writes the values of logged steps, and of evaluations on the way.

    `metrics.jsonl` holds one object a logged step, `evaluations.jsonl` one an evaluation. A run
    that goes on from a checkpoint first drops what came after it: every step stands there once.
    """

    def __init__(
        self, workdir: Path, start: int, stop: int, batch_size: int, ideal: float | None = None
    ) -> None:
        """Starts to write.

        Args:
          workdir: of the run.
          start, stop: steps done, and to be done.
          batch_size: images a step.
          ideal: seconds of a step at the devices' peak, if that is known.
        """
        from tensorboardX import SummaryWriter

        self.path = workdir / "metrics.jsonl"
        self.evaluations = workdir / "evaluations.jsonl"
        for path in (self.path, self.evaluations):
            cut(path, start)
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(total=stop, initial=start, unit="step", dynamic_ncols=True)
        self.batch_size, self.ideal = batch_size, ideal
        self.since, self.waited = (time.perf_counter(), start), 0.0

    def timed(self, batches: Iterable) -> Iterator:
        """The batches, with the time noted that they are waited for."""
        stream = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(stream)
            except StopIteration:
                return
            self.waited += time.perf_counter() - began
            yield batch

    def advance(self) -> None:
        """Moves the bar by a step."""
        self.bar.update()

    def log(self, step: int, values: dict) -> None:
        """Writes the values of a step: numbers, or lists of one a round."""
        now = time.perf_counter()
        passed = now - self.since[0]
        seconds = passed / (step - self.since[1])
        rate = self.batch_size / seconds
        speed = {
            "images_per_second": round(rate, 2),
            "step_seconds": round(seconds, 5),
            "waiting_for_data": round(self.waited / passed, 4),  # share of the time
        }
        if self.ideal:
            speed["mfu"] = round(self.ideal / seconds, 4)
        self.since, self.waited = (now, step), 0.0
        append(self.path, {"step": step} | values | speed)
        for name, value in (values | speed).items():
            if isinstance(value, float):
                self.board.add_scalar(name, value, step)
        bar = {"loss": values["loss"], "mIoU": values.get("miou"), "images/s": rate}
        if self.ideal:
            bar["MFU"] = speed["mfu"]
        self.board.flush()
        known = {name: f"{value:.3g}" for name, value in bar.items() if value is not None}
        self.bar.set_postfix(known)

    def log_evaluation(self, step: int, evaluation: dict) -> None:
        """Writes an evaluation on the way: numbers by name, nested or not, beside other things."""
        append(self.evaluations, {"step": step} | evaluation)
        for name, value in flatten_dict(evaluation, sep="/").items():
            if isinstance(value, float):
                self.board.add_scalar(f"evaluation/{name}", value, step)

    def close(self) -> None:
        self.board.close()
        self.bar.close()


def append(path: Path, row: dict) -> None:
    """Adds a row to a JSON lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def cut(path: Path, step: int) -> None:
    """Drops the rows of later steps from a JSON lines file, if there is one."""
    rows = read_rows(path)
    if kept := [row for row in rows if row["step"] <= step]:
        temporary = path.with_name(f".{path.name}")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)
    else:
        path.unlink(missing_ok=True)


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON lines file, without a last one cut short; none if it is missing."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def summarize(values: dict) -> dict:
    """Means over rounds of 'round' arrays, and every round's mIoU where there is one.

    Args:
      values: numpy arrays: of the objective, 'round' each or '', and of the step, ''.
    """
    row = {name: float(np.mean(value)) for name, value in values.items() if name != "total"}
    row["loss"] = float(values["total"])
    if "miou" in values:
        row["miou_of_rounds"] = [round(float(x), 4) for x in values["miou"]]
    return row
