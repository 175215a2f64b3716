"""Where a mask lies and how it is shaped, from its run lengths: nothing is painted."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.spatial import ConvexHull

from sam_jax.masks import rle


def center(mask: Mapping[str, Any]) -> tuple[float, float]:
    """The mean of a mask's pixels.

    Args:
      mask: an RLE, see `rle.decode`.
    Returns:
      (x, y) in pixels; the centre of the first pixel is (0.5, 0.5).
    Raises:
      RLEError: if the runs are not a mask.
      ValueError: if it is empty.
    """
    start, end = _stretches(mask)
    height = int(mask["size"][0])
    (x0, y0), (x1, y1) = (_sums_before(positions, height) for positions in (start, end))
    area = int((end - start).sum())
    return int((x1 - x0).sum()) / area + 0.5, int((y1 - y0).sum()) / area + 0.5


def hull_area(mask: Mapping[str, Any]) -> float:
    """The area of the convex hull of a mask, whose pixels are squares.

    So the hull of a filled rectangle is as large as its mask, and no hull is smaller.

    Args:
      mask: an RLE, see `rle.decode`.
    Returns:
      Pixels; exact, a multiple of a half.
    Raises:
      RLEError: if the runs are not a mask.
      ValueError: if it is empty.
    """
    start, end = _stretches(mask)
    corners = _corners(start, end, int(mask["size"][0]))
    x, y = corners[ConvexHull(corners).vertices].T  # in order around it
    return abs(int((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())) / 2


def _stretches(mask: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The runs inside a mask: first position 'r', and the first one after 'r'."""
    lengths = rle.runs(mask)
    end, inside = np.cumsum(lengths)[1::2], lengths[1::2]
    if not inside.any():
        raise ValueError(f"mask of size {list(mask['size'])} must have pixels; it is empty")
    return (end - inside)[inside > 0], end[inside > 0]


def _sums_before(position: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """The sums of the columns, and of the rows, of all pixels before each position."""
    column, row = np.divmod(position, height)
    columns = height * (column * (column - 1) // 2) + column * row
    rows = column * (height * (height - 1) // 2) + row * (row - 1) // 2
    return columns, rows


def _corners(start: np.ndarray, end: np.ndarray, height: int) -> np.ndarray:
    """Points 'p 2' (x, y) whose hull is that of the pixels in some runs.

    A run is a rectangle in its first column, one in its last, and one of the columns between.
    """
    (first, top), (last, bottom) = np.divmod(start, height), np.divmod(end - 1, height)
    several = last > first
    left = np.concatenate([first, last, first[several] + 1])
    right = np.concatenate([first + 1, last + 1, last[several]])
    upper = np.concatenate([top, np.where(several, 0, top), np.zeros_like(first[several])])
    lower = np.concatenate(
        [np.where(several, height, bottom + 1), bottom + 1, np.full_like(last[several], height)]
    )
    x = np.concatenate([left, right, left, right])
    return np.stack([x, np.concatenate([upper, upper, lower, lower])], axis=-1)
