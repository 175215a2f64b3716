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
from jaxtyping import Bool, Float, Float64, Int64

from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_runs

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


def iou(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> Float64[np.ndarray, "n k"]:
    """Computes the IoU of every pair of masks from their run lengths, without decoding them.

    Args:
      first: n RLEs, see `rle.decode`.
      second: k RLEs. All masks must have the same size.

    Returns:
      The IoU of each mask in `first` with each mask in `second`; 0 for two empty masks.

    Raises:
      RLEError: If the runs of an RLE are not a mask.
      ValueError: If the masks differ in size.
    """
    first_runs, second_runs = ([rle.bounds(mask) for mask in masks] for masks in (first, second))
    height = _common_height([*first, *second])
    may_overlap = _boxes_overlap(_boxes(first_runs, height), _boxes(second_runs, height))
    # The runs of all second masks, and the mask that each belongs to.
    all_runs = np.concatenate([np.zeros((0, 2), np.int64), *second_runs])
    owner = np.repeat(np.arange(len(second_runs)), [len(runs) for runs in second_runs])
    intersection = np.zeros(may_overlap.shape)
    for i, runs in enumerate(first_runs):
        if may_overlap[i].any():
            near = may_overlap[i, owner]
            shared = np.diff(_pixels_before(all_runs[near], runs))[:, 0]
            intersection[i] = np.bincount(owner[near], shared, minlength=len(second_runs))
    union = _areas(first_runs)[:, None] + _areas(second_runs) - intersection
    return intersection / np.maximum(union, 1)


def _areas(masks: Sequence[Int64[np.ndarray, "_ 2"]]) -> Int64[np.ndarray, " n"]:
    """Returns the areas of masks, given by the bounds of their runs."""
    return np.array([np.diff(runs).sum() for runs in masks], np.int64)


def _boxes(masks: Sequence[Int64[np.ndarray, "_ 2"]], height: int) -> Int64[np.ndarray, "n 4"]:
    """Returns (left, top, right, bottom), both corners inside. An empty mask overlaps no box."""
    boxes = np.tile([rle.MAX_PIXELS, rle.MAX_PIXELS, -1, -1], (len(masks), 1))
    for box, runs in zip(boxes, masks, strict=True):
        if len(runs):
            box[:] = box_of_runs(runs, height)
    return boxes


def _boxes_overlap(
    first: Int64[np.ndarray, "n 4"], second: Int64[np.ndarray, "k 4"]
) -> Bool[np.ndarray, "n k"]:
    """Returns True for boxes that have a pixel in common."""
    corner = np.maximum(first[:, None, :2], second[:, :2])
    opposite = np.minimum(first[:, None, 2:], second[:, 2:])
    return (corner <= opposite).all(axis=-1)


def _pixels_before(
    positions: Int64[np.ndarray, "k 2"], runs: Int64[np.ndarray, "r 2"]
) -> Float64[np.ndarray, "k 2"]:
    """Counts the pixels of a mask before positions, which is linear between bounds of its runs."""
    total = np.cumsum(np.diff(runs))
    before = np.stack([total - np.diff(runs)[:, 0], total], axis=-1)
    return np.interp(positions, runs.ravel(), before.ravel())


def _common_height(masks: Sequence[Mapping[str, Any]]) -> int:
    sizes = {tuple(mask["size"]) for mask in masks}
    if len(sizes) > 1:
        found = " and ".join(f"{height} x {width}" for height, width in sorted(sizes)[:2])
        raise ValueError(f"masks must be of one size; got {found}")
    return int(next(iter(sizes))[0]) if sizes else 0
