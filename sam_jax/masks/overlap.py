"""How much masks overlap, from their run lengths: nothing is painted.

Source: `common/maskApi.c` in cocodataset/cocoapi (rleIou), for masks that are no crowds; as there,
two empty masks have an IoU of 0. Deliberate difference: masks of several sizes are an error, where
pycocotools answers -1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sam_jax.masks import rle


class _Stretches(NamedTuple):
    """The runs inside some masks, those of each mask together.

    Attributes:
      start, end: 'r' int64, positions `column * h + row`, the end being the first one outside.
      owner: 'r' int64, index of the mask that a run is of.
    """

    start: np.ndarray
    end: np.ndarray
    owner: np.ndarray


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
    lengths = [rle.runs(mask) for mask in first]
    ours, theirs = _stretches(lengths), _stretches([rle.runs(mask) for mask in second])
    height = _common_height([*first, *second])
    near = _boxes_meet(_boxes(ours, len(first), height), _boxes(theirs, len(second), height))
    intersection = np.zeros((len(first), len(second)))
    for i, meets in enumerate(near):
        if meets.any():
            start, end, owner = (array[meets[theirs.owner]] for array in theirs)
            shared = _pixels_before(end, lengths[i]) - _pixels_before(start, lengths[i])
            intersection[i] = np.bincount(owner, shared, minlength=len(second))
    union = _areas(ours, len(first))[:, None] + _areas(theirs, len(second)) - intersection
    return intersection / np.maximum(union, 1)


def _stretches(lengths: Sequence[np.ndarray]) -> _Stretches:
    """What lies inside, of masks by what `rle.runs` gives for each."""
    bounds = [np.cumsum(runs) for runs in lengths]
    nothing = np.zeros(0, np.int64)
    end = np.concatenate([nothing, *(b[1::2] for b in bounds)])
    start = np.concatenate([nothing, *(b[: len(b) // 2 * 2 : 2] for b in bounds)])
    owner = np.repeat(np.arange(len(lengths)), [len(b) // 2 for b in bounds])
    kept = end > start
    return _Stretches(start[kept], end[kept], owner[kept])


def _areas(stretches: _Stretches, count: int) -> np.ndarray:
    return np.bincount(stretches.owner, stretches.end - stretches.start, minlength=count)


def _boxes(stretches: _Stretches, count: int, height: int) -> np.ndarray:
    """'n 4' int64, (left, top, right, bottom), both corners inside; meeting no other if empty."""
    first, top = np.divmod(stretches.start, height)
    last, bottom = np.divmod(stretches.end - 1, height)
    whole = last > first  # it goes on in the next column, at the top
    boxes = np.tile([rle.MAX_PIXELS, rle.MAX_PIXELS, -1, -1], (count, 1))
    np.minimum.at(boxes[:, 0], stretches.owner, first)
    np.minimum.at(boxes[:, 1], stretches.owner, np.where(whole, 0, top))
    np.maximum.at(boxes[:, 2], stretches.owner, last)
    np.maximum.at(boxes[:, 3], stretches.owner, np.where(whole, height - 1, bottom))
    return boxes


def _boxes_meet(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether boxes 'n 4' and 'k 4' have a pixel in common -> 'n k' bool."""
    corner = np.maximum(first[:, None, :2], second[:, :2])
    opposite = np.minimum(first[:, None, 2:], second[:, 2:])
    return (corner <= opposite).all(axis=-1)


def _pixels_before(positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many pixels of a mask lie before each position: linear between the bounds of its runs."""
    inside = np.arange(len(lengths)) % 2 == 1
    return np.interp(positions, np.cumsum(lengths), np.cumsum(lengths * inside))


def _common_height(masks: Sequence[Mapping[str, Any]]) -> int:
    sizes = {tuple(mask["size"]) for mask in masks}
    if len(sizes) > 1:
        found = " and ".join(f"{height} x {width}" for height, width in sorted(sizes)[:2])
        raise ValueError(f"masks must be of one size; got {found}")
    return int(next(iter(sizes))[0]) if sizes else 0
