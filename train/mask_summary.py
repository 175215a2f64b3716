"""Prints how well the masks of a run fit its model, before it trains."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from sam_jax.data.loader import Loader
from sam_jax.data.segmentation_batch import Batch
from sam_jax.evaluate.resolution import format_resolution, summarize_resolution
from sam_jax.model.sam import Sam

log = logging.getLogger(__name__)

BATCH_SIZE = 8  # images
MAX_BATCHES = 8
MAX_MASKS = 200
LOW_BOUND = 0.9  # mean IoU, below which the model's resolution is too low
FEW_MASKS = 0.6  # share of the mask slots, below which there are too many slots


def print_mask_summary(model: Sam, loader: Loader) -> None:
    """Prints the resolution bound of a run's masks, and how many of its mask slots hold masks.

    Args:
      model: The model.
      loader: The loader of the run, whose transform makes the masks. Only some images are loaded.
    """
    batches = load_batches(loader)
    summary = summarize_resolution(choose_masks(batches), model.image_size, model.low_res)
    print(f"masks    {format_resolution(summary)}")
    print(f"slots    {describe_slots(batches)}", flush=True)
    if summary["bound"] < LOW_BOUND:
        log.warning(
            "the model's resolution is low for these masks: a larger model.image_encoder.image_size"
            ", a smaller model.image_encoder.patch_size, or windows around objects (data.jitter "
            'with data.jitter_unit="object") raise the bound of %.3f',
            summary["bound"],
        )


def load_batches(loader: Loader) -> list[Batch]:
    """Loads small batches until they hold MAX_MASKS masks, but at most MAX_BATCHES."""
    small = dataclasses.replace(loader, batch_size=BATCH_SIZE, host=0, hosts=1)
    batches: list[Batch] = []
    for step in range(MAX_BATCHES):
        batches.append(small.batch(step)[0])
        if sum(int(np.sum(batch.valid)) for batch in batches) >= MAX_MASKS:
            break
    return batches


def choose_masks(batches: Sequence[Batch]) -> list[Bool[np.ndarray, "h w"]]:
    """Unpacks at most MAX_MASKS masks of the canvas' size, spread over all masks of batches."""
    bits = np.concatenate([np.asarray(batch.masks)[np.asarray(batch.valid)] for batch in batches])
    chosen = np.linspace(0, len(bits) - 1, min(len(bits), MAX_MASKS)).round().astype(int)
    assert batches[0].image is not None
    width = batches[0].image.shape[2]
    return [np.unpackbits(mask, axis=-1, count=width).astype(bool) for mask in bits[chosen]]


def describe_slots(batches: Sequence[Batch]) -> str:
    """Describes how many of the mask slots of batches hold masks."""
    share = float(np.mean([batch.valid for batch in batches]))
    text = f"{100 * share:.0f} % of the mask slots of a batch hold masks"
    if share < 1:
        text += "; the others cost as much"
    if share < FEW_MASKS:
        text += ": a lower objective.masks_per_image makes steps faster"
    return text
