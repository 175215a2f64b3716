"""Rasterizes COCO polygons to exactly the pixels that pycocotools gives.

Corners are rounded to fifths of a pixel, and edges are traced in steps of a fifth. Each time the
trace crosses the center line of a pixel column, all pixels below the crossing in that column toggle
between outside and inside. A region that a polygon encloses twice is therefore a hole. A mask is
the union of its polygons.

Source: `common/maskApi.c` in cocodataset/cocoapi (rleFrPoly).

Differences: Corners that are not finite numbers or exceed MAX_CORNER, and outlines of more than
MAX_STEPS, are errors. A list of four numbers is an error and not a box. Memory and time depend on
the length of the outlines and not on the size of the image. pycocotools itself is not used because
it is a compiled dependency.
"""

from typing import Any

import numpy as np
from jaxtyping import Int64

from sam_jax.masks import rle

SCALE = 5  # steps per pixel
MAX_CORNER = 1e6  # largest coordinate, in pixels
MAX_STEPS = 1 << 22  # on the outlines of a mask; some 800,000 pixels


class PolygonError(ValueError):
    """A value that is not a list of polygons."""


def rasterize(polygons: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Rasterizes the union of polygons.

    Args:
      polygons: A list of lists [x0, y0, x1, y1, ...], in pixels; pixel centers are at +0.5. Values
        of other types are errors.
      size: (height, width) of the image.

    Returns:
      The mask as a compressed RLE, see `sam_jax.masks.rle`.

    Raises:
      PolygonError: If the value is not such a list, or if the outlines are too long.
    """
    if not isinstance(polygons, list) or not polygons:
        raise PolygonError("polygons must be a list of at least one list of numbers")
    traces, steps = [], 0
    for polygon in polygons:
        trace = _trace(_corners(polygon), MAX_STEPS - steps)
        steps += len(trace[0])
        traces.append(trace)
    changes = _union([_changes(*trace, *size) for trace in traces])
    lengths = np.diff(changes, prepend=0, append=size[0] * size[1])
    return rle.compress({"size": list(size), "counts": lengths.tolist()})


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


def _changes(
    u: Int64[np.ndarray, " p"], v: Int64[np.ndarray, " p"], height: int, width: int
) -> Int64[np.ndarray, " r"]:
    """Returns ascending positions `column * h + row` where the polygon's inside begins or ends.

    Args:
      u: The x of points on its outline, in fifths of a pixel.
      v: Their y.
      height: The height of the image.
      width: The width of the image.
    """
    moved = np.flatnonzero(np.diff(u))
    left, top = (np.minimum(x[moved], x[moved + 1]) for x in (u, v))
    column, remainder = np.divmod(left - SCALE // 2, SCALE)
    crosses = (remainder == 0) & (column >= 0) & (column < width)
    row = np.clip(-((SCALE // 2 - top[crosses]) // SCALE), 0, height)
    position, counts = np.unique(column[crosses] * height + row, return_counts=True)
    return position[(counts % 2 == 1) & (position < height * width)]


def _trace(
    corners: Int64[np.ndarray, "k 2"], max_steps: int
) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]:
    """Returns the x and y of points on the outline of a polygon.

    Each edge has one point per step along its longer axis.

    Args:
      corners: The corners in fifths of a pixel.
      max_steps: The largest number of points.
    """
    ends = np.roll(corners, -1, axis=0)
    steps = np.abs(ends - corners).max(axis=1)
    edges = steps > 0
    if (total := int((steps + 1)[edges].sum())) > max_steps:
        raise PolygonError(f"the outlines must have at most {MAX_STEPS // SCALE} pixels")
    start, end, steps = corners[edges], ends[edges], steps[edges]

    # Each edge is traced from the end with the lower coordinate on the longer axis, so that the
    # points are rounded in the same way in both directions.
    index = np.arange(len(steps))
    long_axis = np.where(np.abs(end - start)[:, 0] == steps, 0, 1)
    backwards = start[index, long_axis] > end[index, long_axis]
    low = np.where(backwards[:, None], end, start)
    slope = (end - start + 2 * backwards[:, None] * (start - end))[index, 1 - long_axis] / steps

    edge = np.repeat(index, steps + 1)
    step = np.arange(total) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    step = np.where(backwards[edge], steps[edge] - step, step)
    along = low[index, long_axis][edge] + step
    across = np.trunc(low[index, 1 - long_axis][edge] + slope[edge] * step + 0.5).astype(np.int64)
    x_is_long = long_axis[edge] == 0
    return np.where(x_is_long, along, across), np.where(x_is_long, across, along)


def _union(changes: list[Int64[np.ndarray, " _"]]) -> Int64[np.ndarray, " r"]:
    """Returns the positions where the union of polygons begins or ends.

    Args:
      changes: The positions for each polygon. After an odd number the inside reaches to the end.
    """
    if len(changes) == 1:
        return changes[0]
    position = np.concatenate(changes)
    # At even places a polygon begins, at odd ones it ends.
    entered = np.concatenate([1 - np.arange(len(of_one)) % 2 * 2 for of_one in changes])
    position, index = np.unique(position, return_inverse=True)
    change = np.bincount(index, weights=entered, minlength=len(position)).astype(np.int64)
    inside = np.cumsum(change) > 0
    return position[np.diff(inside, prepend=False)]
