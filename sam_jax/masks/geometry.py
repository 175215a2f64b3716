"""Centers and convex hulls of masks, computed from run lengths without decoding them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64
from scipy.spatial import ConvexHull

from sam_jax.masks import rle


def center(mask: Mapping[str, Any]) -> tuple[float, float]:
    """Computes the mean position of a mask's pixels.

    Args:
      mask: An RLE, see `rle.decode`.

    Returns:
      (x, y) in pixels; the center of the first pixel is (0.5, 0.5).

    Raises:
      RLEError: If the runs are not a mask.
      ValueError: If the mask is empty.
    """
    runs = _nonempty_bounds(mask)
    area = int(np.diff(runs).sum())
    columns, rows = (int(np.diff(s).sum()) for s in _sums_before(runs, int(mask["size"][0])))
    return columns / area + 0.5, rows / area + 0.5


def hull_area(mask: Mapping[str, Any]) -> float:
    """Computes the area of the convex hull of a mask, whose pixels are squares.

    The hull of a filled rectangle is therefore as large as its mask, and no hull is smaller than
    its mask.

    Args:
      mask: An RLE, see `rle.decode`.

    Returns:
      The exact area in pixels, a multiple of a half.

    Raises:
      RLEError: If the runs are not a mask.
      ValueError: If the mask is empty.
    """
    corners = _corners(_nonempty_bounds(mask), int(mask["size"][0]))
    x, y = corners[ConvexHull(corners).vertices].T  # in order around the hull
    return abs(int((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())) / 2


def _nonempty_bounds(mask: Mapping[str, Any]) -> Int64[np.ndarray, "r 2"]:
    runs = rle.bounds(mask)
    if not len(runs):
        raise ValueError(f"mask of size {list(mask['size'])} must have pixels; it is empty")
    return runs


def _sums_before(
    position: Int64[np.ndarray, "r 2"], height: int
) -> tuple[Int64[np.ndarray, "r 2"], Int64[np.ndarray, "r 2"]]:
    """Returns the sums of the columns, and of the rows, of all pixels before each position."""
    column, row = np.divmod(position, height)
    columns = height * (column * (column - 1) // 2) + column * row
    rows = column * (height * (height - 1) // 2) + row * (row - 1) // 2
    return columns, rows


def _corners(runs: Int64[np.ndarray, "r 2"], height: int) -> Int64[np.ndarray, "p 2"]:
    """Returns points (x, y) whose convex hull is that of the pixels of some runs.

    A run is a rectangle in its first column, one in its last, and one of the columns between.
    """
    (first, top), (last, bottom) = (np.divmod(at, height) for at in (runs[:, 0], runs[:, 1] - 1))
    several_columns = last > first
    left, upper, right, lower = np.concatenate(
        [
            [first, top, first + 1, np.where(several_columns, height, bottom + 1)],
            [last, np.where(several_columns, 0, top), last + 1, bottom + 1],
            np.stack([first + 1, np.zeros_like(first), last, np.full_like(last, height)])[
                :, several_columns
            ],
        ],
        axis=1,
    )
    x, y = np.concatenate([left, right, left, right]), np.concatenate([upper, upper, lower, lower])
    return np.stack([x, y], axis=-1)
