"""Overlap of masks, given as arrays or as run lengths.

Source: `common/maskApi.c` in cocodataset/cocoapi (rleIou) for `iou`, with masks that are not
crowds. As there, `iou` of two empty masks is 0, while `mask_iou` gives 1.

Differences: `iou` raises an error for masks of different sizes, where pycocotools returns -1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from sam_jax.masks import rle

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)


def mask_iou(
    a: Bool[ArrayT, "*#batch h w"], b: Bool[ArrayT, "*#batch h w"]
) -> Float[ArrayT, "..."]:
    """Computes the intersection over union of masks.

    Args:
      a: Masks as a numpy or a jax array.
      b: Masks of the same size, as an array of the same kind. Leading axes are broadcast.

    Returns:
      One IoU a pair of masks, 1 if both are empty: float64 for numpy, float32 for jax.
    """
    xp: Any = jnp if isinstance(a, jax.Array) else np
    intersection = xp.sum(a & b, axis=(-2, -1))
    union = xp.sum(a | b, axis=(-2, -1))
    return xp.where(union == 0, 1.0, intersection / xp.maximum(union, 1))


def iou(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The IoU of each of some masks with each of others.

    Args:
      first: n RLEs, see `rle.decode`; second: k RLEs; all of them of one size.
    Returns:
      'n k' float64.
    Raises:
      RLEError: if the runs of one are not a mask.
      ValueError: if the masks are of several sizes.
    """
    ours, theirs = ([rle.bounds(mask) for mask in masks] for masks in (first, second))
    height = _common_height([*first, *second])
    near = _boxes_meet(_boxes(ours, height), _boxes(theirs, height))
    asked = np.concatenate([np.zeros((0, 2), np.int64), *theirs])
    owner = np.repeat(np.arange(len(theirs)), [len(runs) for runs in theirs])
    intersection = np.zeros(near.shape)
    for i, runs in enumerate(ours):
        if near[i].any():
            some = near[i, owner]
            shared = np.diff(_pixels_before(asked[some], runs))[:, 0]
            intersection[i] = np.bincount(owner[some], shared, minlength=len(theirs))
    union = _areas(ours)[:, None] + _areas(theirs) - intersection
    return intersection / np.maximum(union, 1)


def _areas(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Pixels 'n' of masks by the bounds of their runs."""
    return np.array([np.diff(runs).sum() for runs in masks], np.int64)


def _boxes(masks: Sequence[np.ndarray], height: int) -> np.ndarray:
    """'n 4' int64, (left, top, right, bottom), both corners inside; an empty mask's meets none."""
    boxes = np.tile([rle.MAX_PIXELS, rle.MAX_PIXELS, -1, -1], (len(masks), 1))
    for box, runs in zip(boxes, masks, strict=True):
        if len(runs):
            column, row = np.divmod(runs - [0, 1], height)  # of each run's first and last pixel
            goes_on = (column[:, 1] > column[:, 0]).any()  # at the top of the next column
            top, bottom = (0, height - 1) if goes_on else (row.min(), row.max())
            box[:] = column[0, 0], top, column[-1, 1], bottom
    return boxes


def _boxes_meet(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether boxes 'n 4' and 'k 4' have a pixel in common -> 'n k' bool."""
    corner = np.maximum(first[:, None, :2], second[:, :2])
    opposite = np.minimum(first[:, None, 2:], second[:, 2:])
    return (corner <= opposite).all(axis=-1)


def _pixels_before(positions: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """How many pixels of a mask lie before positions: linear between the bounds of its runs."""
    total = np.cumsum(np.diff(runs))
    before = np.stack([total - np.diff(runs)[:, 0], total], axis=-1)
    return np.interp(positions, runs.ravel(), before.ravel())


def _common_height(masks: Sequence[Mapping[str, Any]]) -> int:
    sizes = {tuple(mask["size"]) for mask in masks}
    if len(sizes) > 1:
        found = " and ".join(f"{height} x {width}" for height, width in sorted(sizes)[:2])
        raise ValueError(f"masks must be of one size; got {found}")
    return int(next(iter(sizes))[0]) if sizes else 0
