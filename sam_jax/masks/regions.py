"""Removes small islands and small holes of masks.

Source: segment-anything `utils/amg.py` (remove_small_regions), which needs OpenCV; SciPy here.

Differences: Only the surroundings of the mask are searched. Of islands of the same area the first
in row-major order counts as the largest; OpenCV orders them by blocks of 2 x 2. A mask that has
only small islands may become empty, as in the paper; the released code keeps the largest one.
"""

import numpy as np
from jaxtyping import Bool

from sam_jax.masks.boxes import box_of_mask


def remove_small_regions(
    mask: Bool[np.ndarray, "h w"], min_area: int, *, keep_largest: bool = True
) -> tuple[Bool[np.ndarray, "h w"], bool]:
    """Fills small holes, then removes small islands, both connected by 8 neighbors.

    Args:
      mask: The mask.
      min_area: Regions of fewer pixels are small.
      keep_largest: Keeps the largest island if all are small.

    Returns:
      The mask, and whether any island or hole was small (even if the largest island was kept).
    """
    if not mask.any():
        return mask, False
    height, width = mask.shape
    left, top, right, bottom = box_of_mask(mask)
    # A background region that reaches farther from the mask than this is not small.
    margin = int(min_area) + 1
    rows = slice(max(0, top - margin), min(height, bottom + 1 + margin))
    columns = slice(max(0, left - margin), min(width, right + 1 + margin))
    crop = mask[rows, columns]
    crop, had_holes = fill_small_holes(crop, min_area)
    crop, had_islands = remove_small_islands(crop, min_area, keep_largest=keep_largest)
    if not (had_holes or had_islands):
        return mask, False
    result = np.zeros_like(mask)
    result[rows, columns] = crop
    return result, True


def fill_small_holes(
    mask: Bool[np.ndarray, "h w"], min_area: float
) -> tuple[Bool[np.ndarray, "h w"], bool]:
    """Fills holes of fewer than `min_area` pixels, and returns True if there were any."""
    holes, _ = _small_regions(~mask, min_area)
    return mask | holes, bool(holes.any())


def remove_small_islands(
    mask: Bool[np.ndarray, "h w"], min_area: float, *, keep_largest: bool = True
) -> tuple[Bool[np.ndarray, "h w"], bool]:
    """Removes islands of fewer than `min_area` pixels, and returns True if there were any.

    Args:
      mask: The mask.
      min_area: Islands of fewer pixels are small.
      keep_largest: Keeps the largest island if all are small.
    """
    islands, largest = _small_regions(mask, min_area)
    if not islands.any():
        return mask, False
    rest = mask & ~islands
    return (largest if keep_largest and not rest.any() else rest), True


def _small_regions(
    mask: Bool[np.ndarray, "h w"], min_area: float
) -> tuple[Bool[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """Returns the pixels of small connected regions, and those of the largest region."""
    from scipy import ndimage

    region, count = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(region.ravel(), minlength=count + 1)
    areas[0] = 0
    return ((areas > 0) & (areas < min_area))[region], region == max(1, np.argmax(areas))
