"""Boxes around masks, in numpy.

Source: `utils/amg.py` in facebookresearch/segment-anything dca509f (batched_mask_to_box and
box_xyxy_to_xywh). Corners are pixel indices and inclusive, so the XYWH width is right - left: one
less than the number of columns, while COCO's own code adds the one.
"""

import numpy as np


def box_of_mask(mask: np.ndarray) -> np.ndarray:
    """Finds the smallest box around each mask.

    Args:
      mask: '... h w' bool.
    Returns:
      '... 4' int64, (left, top, right, bottom) in pixel indices, both corners inside the box. An
      empty mask gives zeros, and so does a mask of the pixel (0, 0) alone.
    Raises:
      ValueError: if the mask has fewer than two axes or another dtype.
    """
    mask = np.asarray(mask)
    if mask.ndim < 2 or mask.dtype != np.bool_:
        raise ValueError(
            f"mask must be '... h w' bool, got {mask.dtype} of shape {mask.shape}; "
            "for example box_of_mask(logits > 0)"
        )
    if mask.size == 0:
        return np.zeros((*mask.shape[:-2], 4), np.int64)
    left, right = _first_and_last(np.logical_or.reduce(mask, axis=-2))
    top, bottom = _first_and_last(np.logical_or.reduce(mask, axis=-1))
    return np.stack([left, top, right, bottom], axis=-1)


def xyxy_to_xywh(box: np.ndarray) -> np.ndarray:
    """Replaces the second corner by a size.

    Args:
      box: '... 4', (left, top, right, bottom).
    Returns:
      '... 4' of the same dtype, (left, top, right - left, bottom - top).
    """
    box = np.asarray(box)
    return np.concatenate([box[..., :2], box[..., 2:] - box[..., :2]], axis=-1)


def _first_and_last(line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """'... s' bool -> first and last true index '...', or 0 and 0 where there is none."""
    first = line.argmax(axis=-1)
    last = line.shape[-1] - 1 - line[..., ::-1].argmax(axis=-1)
    return first, np.where(line.any(axis=-1), last, 0)
