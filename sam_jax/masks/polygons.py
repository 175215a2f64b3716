"""Rasterizes COCO polygons to exactly the pixels that pycocotools gives.

Corners are rounded to fifths of a pixel, and edges are traced in steps of a fifth. Where the trace
crosses the middle of a column of pixels, the pixels below it in that column change between outside
and inside. A region that a polygon encloses twice is therefore a hole. A mask is the union of its
polygons.

Source: `common/maskApi.c` in cocodataset/cocoapi (rleFrPoly).

Differences: Corners that are not finite numbers, and polygons that do not fit in memory, are
errors. Four numbers are not read as a box. pycocotools computes the same pixels, but is a compiled
dependency.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

SCALE = 5  # steps a pixel
MAX_CORNER = 1e6  # largest coordinate, in pixels
MAX_STEPS = 1 << 22  # around a polygon: some 800,000 pixels


class PolygonError(ValueError):
    """A value that is not a list of polygons."""


def rasterize(polygons: Any, size: tuple[int, int]) -> Bool[np.ndarray, "{size[0]} {size[1]}"]:
    """Rasterizes the union of polygons.

    Args:
      polygons: A list of lists [x0, y0, x1, y1, ...], in pixels; pixel centres lie at +0.5. Values
        of other types are errors.
      size: (height, width) of the image.

    Returns:
      The mask.

    Raises:
      PolygonError: If the value is not such a list, or a polygon is too long.
    """
    if not isinstance(polygons, list) or not polygons:
        raise PolygonError("polygons must be a list of at least one list of numbers")
    mask = np.zeros(size, bool)
    for polygon in polygons:
        mask |= _inside(_changes(_corners(polygon), *size), *size)
    return mask


def _corners(polygon: Any) -> Int64[np.ndarray, "k 2"]:
    """Checks a polygon and returns its corners in fifths of a pixel."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise PolygonError(
            "a polygon must be a list [x0, y0, x1, y1, ...] of three corners or more"
        )
    for number in polygon:
        if type(number) not in (int, float) or not abs(number) <= MAX_CORNER:
            raise PolygonError(f"a corner must be two numbers up to {MAX_CORNER:g}")
    xy = np.array(polygon, np.float64).reshape(-1, 2)
    return np.trunc(SCALE * xy + 0.5).astype(np.int64)


def _changes(corners: Int64[np.ndarray, "k 2"], height: int, width: int) -> Int64[np.ndarray, " r"]:
    """Returns ascending positions `column * h + row` where pixels change sides."""
    u, v = _trace(corners)
    moved = np.flatnonzero(np.diff(u))
    left, top = (np.minimum(x[moved], x[moved + 1]) for x in (u, v))
    column, rest = np.divmod(left - SCALE // 2, SCALE)
    crosses = (rest == 0) & (column >= 0) & (column < width)
    row = np.clip(-((SCALE // 2 - top[crosses]) // SCALE), 0, height)
    position, times = np.unique(column[crosses] * height + row, return_counts=True)
    return position[(times % 2 == 1) & (position < height * width)]


def _trace(
    corners: Int64[np.ndarray, "k 2"],
) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]:
    """Returns points x and y around a polygon, one a step along the longer axis of each edge."""
    ends = np.roll(corners, -1, axis=0)
    steps = np.abs(ends - corners).max(axis=1)
    edges = steps > 0
    if (total := int((steps + 1)[edges].sum())) > MAX_STEPS:
        raise PolygonError(f"a polygon must be {MAX_STEPS // SCALE} pixels around at most")
    start, end, steps = corners[edges], ends[edges], steps[edges]

    # Every edge is measured from its end that is lower on the longer axis, so that its points are
    # rounded alike in both directions.
    index = np.arange(len(steps))
    long = np.where(np.abs(end - start)[:, 0] == steps, 0, 1)
    backwards = start[index, long] > end[index, long]
    low = np.where(backwards[:, None], end, start)
    slope = (end - start + 2 * backwards[:, None] * (start - end))[index, 1 - long] / steps

    edge = np.repeat(index, steps + 1)
    step = np.arange(total) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    step = np.where(backwards[edge], steps[edge] - step, step)
    along = low[index, long][edge] + step
    across = np.trunc(low[index, 1 - long][edge] + slope[edge] * step + 0.5).astype(np.int64)
    flat = long[edge] == 0
    return np.where(flat, along, across), np.where(flat, across, along)


def _inside(
    changes: Int64[np.ndarray, " r"], height: int, width: int
) -> Bool[np.ndarray, "{height} {width}"]:
    """Fills the pixels between every second change and the next."""
    lengths = np.diff(changes, prepend=0, append=height * width)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T
