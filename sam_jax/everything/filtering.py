"""Sorts the masks that are kept, drops duplicates, and removes small regions.

Source: segment-anything `automatic_mask_generator.py` (_generate_masks, postprocess_small_regions).
"""

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sam_jax.everything.candidates import Candidates
from sam_jax.everything.crops import Crop
from sam_jax.everything.records import SelectedMask
from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask, non_maximum_suppression
from sam_jax.masks.regions import remove_small_regions

NUM_THREADS = 4  # each needs about ten bytes per pixel of the image


def select_masks(crops: Sequence[Crop], candidates: Sequence[Candidates]) -> list[SelectedMask]:
    """Returns the masks to keep, crop by crop, those of a crop by falling predicted IoU.

    Args:
      crops: The crops of an image.
      candidates: The numpy arrays of each crop's candidates.
    """
    masks = []
    for i, (crop, found) in enumerate(zip(crops, candidates, strict=True)):
        kept = np.flatnonzero(found.is_kept)
        for candidate in kept[np.argsort(-found.iou[kept], kind="stable")]:
            masks.append(
                SelectedMask(
                    crop=i,
                    candidate=int(candidate),
                    box=np.asarray(found.box[candidate]) + np.tile(crop.corner, 2),
                    iou=float(found.iou[candidate]),
                    stability=float(found.stability[candidate]),
                )
            )
    return masks


def drop_crop_duplicates(
    masks: Sequence[SelectedMask], crops: Sequence[Crop], threshold: float, capacity: int
) -> list[SelectedMask]:
    """Drops masks whose boxes overlap those of masks from smaller crops.

    Args:
      masks: Masks of all crops.
      crops: The crops of the image.
      threshold: The IoU of two boxes above which one is dropped.
      capacity: A fixed bound on the number of masks, so that every number runs the same program.

    Returns:
      The remaining masks, those of smaller crops first.
    """
    scores = [1 / np.float32(math.prod(crops[mask.crop].size)) for mask in masks]
    return _drop_duplicates(masks, scores, threshold, capacity)


def postprocess_small_regions(
    masks: Sequence[SelectedMask],
    min_area: int,
    *,
    keep_largest: bool,
    threshold: float,
    capacity: int,
) -> list[SelectedMask]:
    """Removes small islands and holes, then drops duplicates, preferring unchanged masks.

    Args:
      masks: Rasterized masks.
      min_area: The area in pixels below which an island or hole is small.
      keep_largest: Keep the largest island of a mask that has only small ones. Otherwise such a
        mask is dropped.
      threshold: The IoU of two boxes above which one is dropped.
      capacity: A fixed bound on the number of masks, so that every number runs the same program.

    Returns:
      The remaining masks, unchanged ones first.
    """

    def clean(mask: SelectedMask) -> tuple[SelectedMask | None, bool]:
        return _remove_small_regions(mask, min_area, keep_largest)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        cleaned = [(mask, changed) for mask, changed in pool.map(clean, masks) if mask is not None]
    scores = [float(not changed) for _, changed in cleaned]
    return _drop_duplicates([mask for mask, _ in cleaned], scores, threshold, capacity)


def round_down_to_float32(threshold: float) -> np.float32:
    """Returns the largest float32 that is not above a float64 threshold.

    A float32 value is above the result exactly if it is above the threshold.

    Args:
      threshold: The threshold.
    """
    nearest = np.float32(threshold)
    return nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-np.inf))


def _remove_small_regions(
    mask: SelectedMask, min_area: int, keep_largest: bool
) -> tuple[SelectedMask | None, bool]:
    """Returns the cleaned mask, or None if nothing is left, and True if it changed."""
    assert mask.segmentation is not None
    pixels, changed = remove_small_regions(
        rle.decode(mask.segmentation), min_area, keep_largest=keep_largest
    )
    if not changed:
        return mask, False
    if not pixels.any():
        return None, True
    box = box_of_mask(pixels)
    return dataclasses.replace(mask, segmentation=rle.encode(pixels), box=box), True


def _drop_duplicates(
    masks: Sequence[SelectedMask],
    scores: Sequence[float | np.float32],
    threshold: float,
    capacity: int,
) -> list[SelectedMask]:
    """Drops masks whose boxes overlap those of higher scores, and sorts the rest by their scores.

    The masks are padded to `capacity`, so that their number compiles no program.
    """
    boxes = np.zeros((capacity, 4), np.float32)
    padded_scores = np.zeros(capacity, np.float32)
    if masks:
        boxes[: len(masks)] = [mask.box for mask in masks]
        padded_scores[: len(masks)] = scores
    is_kept = non_maximum_suppression(
        boxes, padded_scores, np.arange(capacity) < len(masks), round_down_to_float32(threshold)
    )
    kept = np.flatnonzero(is_kept)
    return [masks[i] for i in kept[np.argsort(-padded_scores[kept], kind="stable")]]
