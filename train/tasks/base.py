"""The interface of a task, and the table of all tasks.

A task is everything in which runs of different models differ. To add one, write a file in this
folder with a class that has the members of `Task`, and add a row to `TASKS`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from sam_jax.data.loader import Transform
from sam_jax.data.open import Subset
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import Sam
from train.config import ConfigError, Data, Interactive, PretrainData, Reconstruction, TrainConfig
from train.sharding import Objective
from train.tasks.reconstruction import ReconstructionTask
from train.tasks.segmentation import SegmentationTask


@runtime_checkable
class Task(Protocol):
    """A task that a run learns. The constructor takes the `TrainConfig`.

    Attributes:
      needs_masks: Whether the masks of examples are read.
      transform: Turns an example into a row of a batch.
      decode_size: (height, width) that images are decoded for, see `open_source`; None: in full.
      init_fn: Initializes the model's variables.
      objective: The objective, a function of (params, constants, batch, key).
      encoder_depth: Blocks of the image encoder, for its layer-wise learning rates.
      flops: FLOPs of the reference implementation for a training step of one image; None if the
        step leaves some of them out.
    """

    needs_masks: bool
    transform: Transform
    decode_size: tuple[int, int] | None
    init_fn: Callable[[], dict[str, Any]]
    objective: Objective
    encoder_depth: int
    flops: float | None

    @property
    def trained_model(self) -> Sam | MaskedAutoencoder:
        """The model of the configuration, which also tells the size of the objects in training.

        The weights are saved with it.
        """
        ...

    def initial_variables(self, train_split: Subset) -> dict[str, Any]:
        """Returns the variables to start from: those of `init_from`, or those of `init_fn`.

        Args:
          train_split: The images to train on, which some initial values depend on.

        Raises:
          ConfigError: If `init_from` holds another model.
        """
        ...

    def batch_spec(self) -> Any:
        """Returns the shapes of a batch of all hosts."""
        ...

    def batch_transform(
        self, get_variables: Callable[[], dict[str, Any]], train_split: Subset, name: str
    ) -> Callable[[Any], Any]:
        """Returns the transform that is applied to each host batch before the train step.

        Args:
          get_variables: Returns the variables that the stage starts from.
          train_split: The images to train on.
          name: The name of this host, for files that the transform keeps.
        """
        ...

    def evaluate(
        self, variables: dict[str, Any], eval_split: Subset
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Evaluates the model.

        Returns:
          The content of evaluation.json, and that of objects.jsonl, which has a row per object; no
          rows if the task has no objects.
        """
        ...

    def report(
        self,
        workdir: Path,
        variables: dict[str, Any],
        eval_split: Subset,
        evaluation: dict[str, Any],
    ) -> None:
        """Writes the folder report/ of the workdir and prints the evaluation."""
        ...


class TaskRow(NamedTuple):
    """A task, and the classes of the parts of its configuration."""

    model: type
    data: type
    objective: type
    task: Callable[[TrainConfig], Task]


TASKS = (
    TaskRow(Sam, Data, Interactive, SegmentationTask),
    TaskRow(MaskedAutoencoder, PretrainData, Reconstruction, ReconstructionTask),
)


def make_task(config: TrainConfig) -> Task:
    """Makes the task of a configuration, which its model determines.

    Args:
      config: The configuration.

    Returns:
      The task.

    Raises:
      ConfigError: If model, data and objective do not belong to one task, or if the task cannot run
        with the values of some fields.
    """
    parts = (type(config.model), type(config.data), type(config.objective))
    for row in TASKS:
        if parts == row[:3]:
            return row.task(config)
    allowed = " or ".join(", ".join(part.__name__ for part in row[:3]) for row in TASKS)
    got = ", ".join(part.__name__ for part in parts)
    raise ConfigError(f"model, data and objective must be {allowed}; got {got}")
