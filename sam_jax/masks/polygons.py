"""Polygons as COCO paints them: the very pixels that pycocotools gives.

Corners are rounded to fifths of a pixel, and edges are walked in steps of a fifth. Where the walk
passes the middle of a column of pixels, the pixels below in that column change between outside and
inside; so what a single polygon encloses twice is a hole. A mask is the union of its polygons.

Source: `common/maskApi.c` in cocodataset/cocoapi (rleFrPoly). Deliberate differences: corners of
other than finite numbers, or more of them than fit in memory, are refused; four numbers are not
taken for a box.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

SCALE = 5  # steps a pixel
MAX_CORNER = 1e6  # pixels from the origin
MAX_STEPS = 1 << 22  # around a polygon: some 800,000 pixels


class PolygonError(ValueError):
    """What is no list of polygons."""


def paint(polygons: Any, size: tuple[int, int]) -> np.ndarray:
    """Paints the union of polygons.

    Args:
      polygons: a list of lists [x0, y0, x1, y1, ...], in pixels; pixel centres lie at +0.5.
      size: (height, width) of the image.
    Returns:
      'h w' bool.
    Raises:
      PolygonError: if it is no such list, or a polygon is too long to be walked around.
    """
    if not isinstance(polygons, list) or not polygons:
        raise PolygonError("polygons must be a list of at least one list of numbers")
    mask = np.zeros(size, bool)
    for polygon in polygons:
        mask |= _inside(_changes(_corners(polygon), *size), *size)
    return mask


def _corners(polygon: Sequence[Any]) -> np.ndarray:
    """Checks a polygon -> 'k 2' int64, its corners in fifths of a pixel."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise PolygonError(
            "a polygon must be a list [x0, y0, x1, y1, ...] of three corners or more"
        )
    for number in polygon:
        if type(number) not in (int, float) or not abs(number) <= MAX_CORNER:
            raise PolygonError(f"a corner must be two numbers up to {MAX_CORNER:g}")
    xy = np.array(polygon, np.float64).reshape(-1, 2)
    return np.trunc(SCALE * xy + 0.5).astype(np.int64)


def _changes(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Positions `column * h + row`, ascending, from which on pixels change sides."""
    u, v = _walk(corners)
    moved = np.flatnonzero(np.diff(u))
    left, top = (np.minimum(x[moved], x[moved + 1]) for x in (u, v))
    column, rest = np.divmod(left - SCALE // 2, SCALE)
    seen = (rest == 0) & (column >= 0) & (column < width)
    row = np.clip(-((SCALE // 2 - top[seen]) // SCALE), 0, height)
    position, times = np.unique(column[seen] * height + row, return_counts=True)
    return position[(times % 2 == 1) & (position < height * width)]


def _walk(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points of a walk around a polygon, one a step of the longer axis of each edge."""
    ends = np.roll(corners, -1, axis=0)
    steps = np.abs(ends - corners).max(axis=1)
    edges = steps > 0
    if (total := int((steps + 1)[edges].sum())) > MAX_STEPS:
        raise PolygonError(f"a polygon must be {MAX_STEPS // SCALE} pixels around at most")
    start, end, steps = corners[edges], ends[edges], steps[edges]

    # Every edge is measured from the end that is lower on its longer axis, and so rounded alike
    # whichever way it is walked.
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


def _inside(changes: np.ndarray, height: int, width: int) -> np.ndarray:
    lengths = np.diff(changes, prepend=0, append=height * width)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T
