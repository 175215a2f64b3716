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
    runs = _runs_inside(mask)
    area = int(np.diff(runs).sum())
    columns, rows = (int(np.diff(s).sum()) for s in _sums_before(runs, int(mask["size"][0])))
    return columns / area + 0.5, rows / area + 0.5


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
    corners = _corners(_runs_inside(mask), int(mask["size"][0]))
    x, y = corners[ConvexHull(corners).vertices].T  # in order around it
    return abs(int((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())) / 2


def _runs_inside(mask: Mapping[str, Any]) -> np.ndarray:
    runs = rle.bounds(mask)
    if not len(runs):
        raise ValueError(f"mask of size {list(mask['size'])} must have pixels; it is empty")
    return runs


def _sums_before(position: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """The sums of the columns, and of the rows, of all pixels before each position."""
    column, row = np.divmod(position, height)
    columns = height * (column * (column - 1) // 2) + column * row
    rows = column * (height * (height - 1) // 2) + row * (row - 1) // 2
    return columns, rows


def _corners(runs: np.ndarray, height: int) -> np.ndarray:
    """Points 'p 2' (x, y) whose hull is that of the pixels of some runs.

    A run is a rectangle in its first column, one in its last, and one of the columns between.
    """
    (first, top), (last, bottom) = (np.divmod(at, height) for at in (runs[:, 0], runs[:, 1] - 1))
    goes_on = last > first
    left, upper, right, lower = np.concatenate(
        [
            [first, top, first + 1, np.where(goes_on, height, bottom + 1)],
            [last, np.where(goes_on, 0, top), last + 1, bottom + 1],
            np.stack([first + 1, np.zeros_like(first), last, np.full_like(last, height)])[
                :, goes_on
            ],
        ],
        axis=1,
    )
    x, y = np.concatenate([left, right, left, right]), np.concatenate([upper, upper, lower, lower])
    return np.stack([x, y], axis=-1)
