"""The masks of an image that are kept: in which order, without duplicates, and cleaned.

Source: segment-anything `automatic_mask_generator.py` (_generate_masks, postprocess_small_regions).
"""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask, non_maximum_suppression
from sam_jax.masks.regions import remove_small_regions

THREADS = 4  # each needs some ten bytes a pixel of the image


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """A mask that is kept.

    Attributes:
      crop: the index of the crop that it was found in; number: its index in `Candidates`.
      box: '4' int, (left, top, right, bottom), inclusive, in pixels of the image.
      iou: predicted; stability: its score.
      segmentation: its run lengths in the image, once it is drawn.
    """

    crop: int
    number: int
    box: np.ndarray
    iou: float
    stability: float
    segmentation: dict[str, Any] | None = None

    def drawn(self, segmentation, box):
        """The same with what it is seen to be."""
        return dataclasses.replace(self, segmentation=segmentation, box=box)


def in_order(crops, found):
    """The masks of `Candidates` of each `Crop`, crop by crop, and the best first."""
    masks = []
    for i, (crop, candidates) in enumerate(zip(crops, found, strict=True)):
        kept = np.flatnonzero(candidates.kept)
        for number in kept[np.argsort(-candidates.iou[kept], kind="stable")]:
            box = candidates.box[number] + np.tile(crop.corner, 2)
            iou, stability = candidates.iou[number], candidates.stability[number]
            masks.append(Mask(i, int(number), box, float(iou), float(stability)))
    return masks


def drop_duplicates_of_crops(masks, crops, threshold, capacity):
    """Drops masks whose boxes overlap those of masks from smaller crops, which come first."""
    scores = [1 / np.float32(math.prod(crops[mask.crop].size)) for mask in masks]
    return _drop_duplicates(masks, scores, threshold, capacity)


def clean(masks, min_area, keep_largest, threshold, capacity):
    """Removes small parts and holes, then masks that are duplicates of others that had none.

    Args:
      masks: that are drawn; min_area, keep_largest: see `remove_small_regions`; masks of which
        nothing is left are dropped.
      threshold: of the IoU of boxes; capacity: see `_drop_duplicates`.
    Returns:
      The masks that had nothing small first.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        cleaned = pool.map(lambda mask: _clean(mask, min_area, keep_largest), masks)
        left = [(mask, changed) for mask, changed in cleaned if mask.segmentation]
    scores = [float(not changed) for _, changed in left]
    return _drop_duplicates([mask for mask, _ in left], scores, threshold, capacity)


def float32_below(threshold: float) -> np.float32:
    """The largest float32 that is not above: a float32 exceeds both or neither."""
    nearest = np.float32(threshold)
    return nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-np.inf))


def _clean(mask, min_area, keep_largest):
    """A mask, without run lengths if nothing is left of it, and whether anything was small."""
    pixels, changed = remove_small_regions(
        rle.decode(mask.segmentation), min_area, keep_largest=keep_largest
    )
    if not changed:
        return mask, False
    segmentation = rle.encode(pixels) if pixels.any() else None
    return mask.drawn(segmentation, box_of_mask(pixels)), True


def _drop_duplicates(masks, scores, threshold, capacity):
    """The masks whose boxes do not overlap those of better ones, the best first.

    They are padded to `capacity`, so that their number compiles no program.
    """
    scores = np.array(scores, np.float32)
    padded = lambda values, shape: np.resize(np.array(values, np.float32), shape)
    is_kept = non_maximum_suppression(
        padded([mask.box for mask in masks], (capacity, 4)),
        padded(scores, capacity),
        np.arange(capacity) < len(masks),
        float32_below(threshold),
    )
    kept = np.flatnonzero(is_kept)
    return [masks[i] for i in kept[np.argsort(-scores[kept], kind="stable")]]
