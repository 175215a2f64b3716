"""Small parts and small holes of masks.

Source: segment-anything `utils/amg.py` (remove_small_regions), which needs OpenCV; SciPy here.
Differences: only the surroundings of the mask are looked at; of parts that are equally large the
first by rows is the largest, where OpenCV takes the first by blocks of 2 x 2; masks of small parts
alone may be emptied, as the paper does, instead of keeping the largest one, as the released code.
"""

import numpy as np

from sam_jax.masks.boxes import box_of_mask


def remove_small_regions(
    mask: np.ndarray, min_area: int, *, keep_largest: bool = True
) -> tuple[np.ndarray, bool]:
    """Fills holes, then removes parts, of fewer than `min_area` pixels that touch by 8 neighbours.

    Args:
      mask: 'h w' bool; min_area: in pixels.
      keep_largest: keep the largest part where all are small; of several the first by rows.
    Returns:
      The mask 'h w' bool, and whether anything was small, though it be the largest part, which
      stays.
    """
    if not mask.any():
        return mask, False
    height, width = mask.shape
    left, top, right, bottom = box_of_mask(mask)
    # What of the background leads farther from the mask than this is not small.
    margin = int(min_area) + 1
    rows = slice(max(0, top - margin), min(height, bottom + 1 + margin))
    columns = slice(max(0, left - margin), min(width, right + 1 + margin))
    part = mask[rows, columns]
    holes, _ = _small(~part, min_area)
    part = part | holes
    islands, largest = _small(part, min_area)
    if not (holes.any() or islands.any()):
        return mask, False
    result = np.zeros_like(mask)
    result[rows, columns] = part & ~islands
    if keep_largest and not result.any():
        result[rows, columns] = largest
    return result, True


def _small(mask: np.ndarray, min_area: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels 'h w' bool of small parts, and those of the largest part."""
    from scipy import ndimage

    part, count = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(part.ravel(), minlength=count + 1)
    areas[0] = 0
    return ((areas > 0) & (areas < min_area))[part], part == max(1, np.argmax(areas))
