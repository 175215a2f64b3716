"""The facts of a run that people want to see first, on the console and in the report."""

import json
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from sam_jax.data.open import Subset
from sam_jax.io.atomic import write_json
from train.config import TrainConfig
from train.optimizer import is_trainable
from train.rows import Row
from train.run_record import versions

NAME = "summary.json"  # in the workdir


def describe_run(
    config: TrainConfig,
    mesh: Mesh,
    params: dict[str, Any],
    train_split: Subset,
    eval_split: Subset,
    address: str,
) -> dict[str, str]:
    """Describes a run in five lines.

    Args:
      config: The run.
      mesh: Its devices.
      params: The model's parameters, or their shapes.
      train_split: The images to train on.
      eval_split: The images to evaluate on.
      address: The workdir, a path or a URL.

    Returns:
      A text for each name, in the order of the lines.
    """
    height, width = config.model.image_size
    images = f"{len(train_split):,} of {config.data.source}"
    if config.data.held_out:
        images += f", and {len(eval_split):,} held out for the evaluation"
    return {
        "model": f"{type(config.model).__name__}, {height} x {width} pixels, "
        + describe_parameters(params, config.trainable),
        "devices": describe_devices(mesh),
        "images": images,
        "steps": describe_steps(config),
        "workdir": address,
    }


def describe_steps(config: TrainConfig) -> str:
    """Returns for example "5,600 in 3 stages, each of 8 images".

    A run that ends before its last stages begin is, for example, "600 in 1 of 3 stages, ...".
    """
    parts = config.parts()
    reached, total = len(parts), 1 + len(config.stages)
    stages = f"{total} stages" if reached == total else f"{reached} of {total} stages"
    images = " or ".join(f"{size:,}" for size in sorted({part.batch_size for _, _, part in parts}))
    return (
        f"{config.num_steps:,}{f' in {stages}' if config.stages else ''}, each of {images} images"
    )


def describe_parameters(params: dict[str, Any], trainable: tuple[str, ...]) -> str:
    """Returns for example "4,058,340 parameters, of which 12,345 are trained"."""
    sizes = {path: x.size for path, x in flatten_dict(params, sep="/").items()}
    trained = sum(size for path, size in sizes.items() if is_trainable(path, trainable))
    text = f"{sum(sizes.values()):,} parameters"
    return f"{text}, of which {trained:,} are trained" if trainable else text


def describe_devices(mesh: Mesh) -> str:
    """Returns for example "8 x TPU v5 lite on 2 hosts"."""
    devices = mesh.devices.flatten()
    hosts = len({device.process_index for device in devices})
    where = f" on {hosts} hosts" if hosts > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind}{where}"


def write_summary(workdir: Path, summary: dict[str, str]) -> None:
    """Writes a summary, with the versions of the software, for the report.

    Args:
      workdir: The folder of the run.
      summary: The result of `describe_run`.
    """
    write_json(workdir / NAME, summary | {"versions": versions()})


def read_summary(workdir: Path) -> dict[str, Any]:
    """Reads the summary of a run, as `write_summary` has written it."""
    return json.loads((workdir / NAME).read_text(encoding="utf-8"))


def format_summary(summary: dict[str, str]) -> str:
    """Returns the lines of a summary."""
    return "\n".join(f"{name:8} {text}" for name, text in summary.items())


def training_seconds(rows: list[Row]) -> float:
    """Returns the duration of all logged steps, including compilation and evaluations.

    Args:
      rows: The rows of metrics.jsonl.
    """
    steps = [0, *(row["step"] for row in rows)]
    return sum(
        (stop - start) * row["step_seconds"]
        for start, stop, row in zip(steps, steps[1:], rows, strict=False)
    )


def format_duration(seconds: float) -> str:
    """Returns for example "1 h 5 min", "12 min" or "40 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
