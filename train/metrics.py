"""What a run says of itself while it runs: JSON lines, TensorBoard events, a progress bar."""

import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm


class Metrics:
    """Writes the values of logged steps.

    `metrics.jsonl` holds one object a logged step. A run that goes on from a checkpoint first cuts
    off what came after it, so that every step stands there once.
    """

    def __init__(self, workdir: Path, start: int, stop: int, batch_size: int) -> None:
        from tensorboardX import SummaryWriter

        self.path = workdir / "metrics.jsonl"
        kept = [row for row in read_rows(self.path) if row["step"] <= start]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(total=stop, initial=start, unit="step", dynamic_ncols=True)
        self.batch_size = batch_size
        self.since = time.perf_counter(), start

    def advance(self) -> None:
        """Moves the bar by a step."""
        self.bar.update()

    def log(self, step: int, values: dict) -> None:
        """Writes the values of a step: numbers, or lists of one a round."""
        now = time.perf_counter()
        rate = self.batch_size * (step - self.since[1]) / (now - self.since[0])
        self.since = now, step
        row = {"step": step} | values | {"images_per_second": round(rate, 2)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            if isinstance(value, float):
                self.board.add_scalar(name, value, step)
        bar = {"loss": values["loss"], "mIoU": values["miou"], "images/s": rate}
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in bar.items()})

    def log_evaluation(self, step: int, evaluation: dict) -> None:
        """Writes an evaluation on the way, to evaluations.jsonl."""
        with open(self.path.with_name("evaluations.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | evaluation) + "\n")
        for clicks, iou in evaluation["clicks"].items():
            self.board.add_scalar(f"evaluation/{clicks}_clicks", iou["chosen"], step)
        self.board.add_scalar("evaluation/box", evaluation["box"]["chosen"], step)

    def close(self) -> None:
        self.board.close()
        self.bar.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON lines file, without a last one that was cut short; none if it is missing."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def summarize(values: dict) -> dict:
    """Means over rounds of 'round' arrays, and the first and last round's mIoU.

    Args:
      values: numpy arrays: of the objective, 'round' each, and of the step, ''.
    """
    row = {name: float(np.mean(value)) for name, value in values.items() if name != "total"}
    row["loss"] = float(values["total"])
    row["miou_of_rounds"] = [round(float(x), 4) for x in values["miou"]]
    return row
