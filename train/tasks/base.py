"""What a run learns: all in which runs differ from one another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from sam_jax.data.loader import Transform
from sam_jax.data.open import Subset
from train.config import TrainConfig, is_reconstruction
from train.tasks.reconstruction import MaeTask
from train.tasks.segmentation import SamTask


class Task(Protocol):
    """A thing to learn.

    Attributes:
      needs_masks: whether examples' masks have to be read.
      prepare: what makes an example a row of a batch.
      decode_size: the frame that images are decoded for, see `open_source`; None: in full.
      objective: f(params, constants, batch, key) -> (loss, values).
      encoder_depth: Blocks of the image encoder, for its layer-wise learning rates.
      flops: of the reference, a training step of one image; None if not all of it is done.
    """

    needs_masks: bool
    transform: Transform
    decode_size: tuple[int, int] | None
    objective: Callable
    encoder_depth: int
    flops: float | None

    def initialize(self) -> dict:
        """Draws variables, as a run without `init_from` begins with."""
        ...

    def batch_like(self) -> Any:
        """The shapes of a batch of all hosts."""
        ...

    def completion(self, variables: dict, path: Path, seen: Subset) -> Callable:
        """What a batch goes through before a step; `path` is of a file of this host's own."""
        ...

    def bytes_on_disk(self, seen: Subset) -> int:
        """What the completion will write."""
        ...

    def evaluate(self, variables: dict, held_out: Subset) -> dict:
        """What evaluation.json holds."""
        ...

    def report(self, workdir: Path, variables: dict, held_out: Subset, evaluation: dict) -> None:
        """Writes report/, and prints the evaluation."""
        ...


def task_of(config: TrainConfig) -> Task:
    """What a config says is to be learnt."""
    return MaeTask(config) if is_reconstruction(config) else SamTask(config)
