"""The images of a run: those to train on, those held out, and the loader of batches."""

import dataclasses

import jax
import numpy as np

from sam_jax.data.example import SourceError
from sam_jax.data.loader import Loader
from sam_jax.data.open import Subset, exclude, open_source, select, with_full_size
from sam_jax.data.sources.mixed import Mixture
from train.config import TrainConfig
from train.tasks.base import Task


def open_data(config: TrainConfig, task: Task) -> tuple[Subset, Subset]:
    """Opens the images.

    Args:
      config: The run.
      task: Its task.

    Returns:
      The images to train on, and those to evaluate on, which are always decoded in full. They are
      the same if no images are held out.

    Raises:
      SourceError: If the images cannot be opened.
    """
    source = open_source(config.data.source, decode_size=task.decode_size, masks=task.needs_masks)
    full_size = with_full_size(source)
    if not config.data.held_out:
        return select(source, ":"), select(full_size, ":")
    eval_split = select(full_size, config.data.held_out)
    return without_copies(exclude(source, config.data.held_out), eval_split), eval_split


def without_copies(train_split: Subset, eval_split: Subset) -> Subset:
    """Removes other copies of held-out images, which a mixture may contain, from the training."""
    if not isinstance(train_split.source, Mixture):
        return train_split
    held_out = {eval_split.name(i) for i in range(len(eval_split))}
    is_copy = [train_split.name(i) in held_out for i in range(len(train_split))]
    if all(is_copy):
        raise SourceError("data.held_out leaves no image to train on")
    return dataclasses.replace(train_split, indices=train_split.indices[~np.array(is_copy)])


def make_loader(config: TrainConfig, task: Task, split: Subset) -> Loader:
    """Makes the loader of this host's rows of the batches."""
    return Loader(
        source=split.source,
        indices=split.indices,
        transform=task.transform,
        batch_size=config.batch_size,
        seed=config.seed,
        views=getattr(config.data, "views", 0),
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
