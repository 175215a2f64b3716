"""Chooses the part of an image, a tile, in which a prompted object is predicted.

The tiles of an image form a pyramid. A level has tiles of one size, which overlap by seven eighths
in each direction; the last level is the entire image. All choices depend on the image's size and
the prompt alone, except that an object with a `mask_input` may stay in the tile that it comes from.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from sam_jax.images.resize import MAX_ZOOM
from sam_jax.predict.tiles_option import check_tiles

LEVEL_RATIO = math.sqrt(2)  # of the sides of two levels' tiles
OCTAVE = 2  # levels in which the side doubles
STRIDE = 1 / 8  # of the tiles of a level, as a fraction of their side
POINT_ZOOM = 4.0  # canvas pixels per image pixel in the finest tiles that are tried for points
BOX_SHARE = 0.7  # of a tile's side, which the longer side of a box should take
MASK_SHARE = 0.5  # the same for the box of a predicted mask, whose object may be larger
KEPT_SHARES = (0.3, 0.9)  # of a tile's side, for an object that further prompts correct
MARGIN = 1 / 8  # of a tile's side, which should be left around clicks


class Tile(NamedTuple):
    """A rectangular part of an image that the model sees alone, in pixels of the image."""

    top: int
    left: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def corner(self) -> tuple[int, int]:
        """(x, y) of the top-left pixel."""
        return self.left, self.top

    @property
    def region(self) -> tuple[slice, slice]:
        """The index of its pixels in the image."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


class Pyramid(NamedTuple):
    """The tiles of an image.

    Attributes:
      image_size: (height, width) of the image.
      canvas: (height, width) of the padded input that the model takes.
      scales: For each level, the image pixels per pixel of the canvas, from fine to coarse. At the
        last scale, the entire image fits into the canvas.
    """

    image_size: tuple[int, int]
    canvas: tuple[int, int]
    scales: tuple[float, ...]

    @property
    def image_tile(self) -> Tile:
        """The entire image as a tile."""
        return Tile(0, 0, *self.image_size)


def plan_pyramid(
    image_size: tuple[int, int],
    canvas: tuple[int, int],
    tiles: int | str | None,
    *,
    max_zoom: float = MAX_ZOOM,
) -> Pyramid:
    """Plans the tiles of an image.

    Args:
      image_size: (height, width) of the image.
      canvas: (height, width) of the padded input that the model takes.
      tiles: "auto" for levels whose sides grow by LEVEL_RATIO, up to the image's; a number for a
        single level of tiles with this longer side, in pixels of the image; None or "none" for no
        tiles. The entire image is always the last level, and the only one if a tile would cover it.
      max_zoom: Canvas pixels per image pixel in the finest level of "auto".

    Raises:
      ValueError: If `tiles` is something else.
    """
    check_tiles(tiles)
    image_scale = max(image_size[0] / canvas[0], image_size[1] / canvas[1])
    finer: list[float] = []
    if tiles == "auto":
        scale = 1 / max_zoom
        while scale * LEVEL_RATIO**0.5 < image_scale:  # a nearer level adds nothing
            finer.append(scale)
            scale *= LEVEL_RATIO
    elif isinstance(tiles, int) and tiles / max(canvas) < image_scale:
        finer.append(tiles / max(canvas))
    return Pyramid(image_size, canvas, (*finer, image_scale))


def tile_for_box(
    pyramid: Pyramid,
    box: Float[np.ndarray, " 4"],
    points: Float[np.ndarray, "k 2"],
    box_share: float = BOX_SHARE,
) -> Tile:
    """Returns the tile that shows a box best.

    Its level is the one in which the box's longer side is nearest to `box_share` of a tile's side,
    and it is the tile of this level whose center is nearest to the box's. If that does not contain
    the box and the points, the next coarser level is taken.

    Args:
      pyramid: The tiles of the image.
      box: (x0, y0, x1, y1) in pixels of the image.
      points: (x, y) of the points that come with the box.
      box_share: The share of a tile's side that the box's longer side should take.
    """
    box = _clip(pyramid, box)
    contents = _bounds(np.concatenate([box.reshape(2, 2), _clip(pyramid, points)]))
    height, width = box[3] - box[1], box[2] - box[0]
    share = max(height / pyramid.canvas[0], width / pyramid.canvas[1], 1e-9) / box_share
    nearest = int(np.argmin(np.abs(np.log(share / np.array(pyramid.scales)))))
    for scale in pyramid.scales[nearest:-1]:
        tile = nearest_tile(pyramid, scale, box)
        if _contains(pyramid, tile, contents, margin=0):
            return tile
    return pyramid.image_tile


def tiles_for_points(pyramid: Pyramid, points: Float[np.ndarray, "k 2"]) -> list[Tile]:
    """Returns the tiles in which an object under points may be seen best, from fine to coarse.

    They are the entire image and a tile of every octave of levels: the one whose center is nearest
    to that of the points, if it contains all of them with MARGIN. Levels of more than POINT_ZOOM
    are left out, unless there are no others. The predicted mask leads to them if its object is that
    small.

    Args:
      pyramid: The tiles of the image.
      points: (x, y) in pixels of the image, at least one.
    """
    contents = _bounds(_clip(pyramid, points))
    finer = pyramid.scales[:-1]
    scales = [scale for scale in finer if scale * POINT_ZOOM >= 1] or finer[-1:]
    tiles = [nearest_tile(pyramid, scale, contents) for scale in scales[::OCTAVE]]
    return [tile for tile in tiles if _contains(pyramid, tile, contents, MARGIN)] + [
        pyramid.image_tile
    ]


def tile_for_object(
    pyramid: Pyramid,
    tile: Tile,
    box: Float[np.ndarray, " 4"],
    points: Float[np.ndarray, "k 2"],
) -> Tile:
    """Returns the tile for further prompts of an object that was predicted before.

    Args:
      pyramid: The tiles of the image.
      tile: The tile in which the object was predicted.
      box: (x0, y0, x1, y1) in pixels of the image, around the prediction and what the prompts add.
      points: (x, y) in pixels of the image of all points.

    Returns:
      `tile` if it contains the box and the points, and the longer side of the box takes a share of
      it in KEPT_SHARES; otherwise `tile_for_box` with MASK_SHARE.
    """
    contents = _bounds(np.concatenate([box.reshape(2, 2), points]))
    share = max((box[2] - box[0]) / tile.width, (box[3] - box[1]) / tile.height)
    is_kept = KEPT_SHARES[0] <= share <= KEPT_SHARES[1]
    if is_kept and _contains(pyramid, tile, _clip(pyramid, contents), margin=0):
        return tile
    return tile_for_box(pyramid, box, points, MASK_SHARE)


def nearest_tile(pyramid: Pyramid, scale: float, box: Float[np.ndarray, " 4"]) -> Tile:
    """Returns the tile of a level whose center is nearest to that of a box.

    The tiles lie inside the image, the outermost ones at its border.

    Args:
      pyramid: The tiles of the image.
      scale: The level, one of `pyramid.scales`.
      box: (x0, y0, x1, y1) in pixels of the image.
    """
    if scale == pyramid.scales[-1]:
        return pyramid.image_tile
    height, width = tile_size(pyramid, scale)
    top = _nearest_start(pyramid.image_size[0], height, (box[1] + box[3]) / 2)
    left = _nearest_start(pyramid.image_size[1], width, (box[0] + box[2]) / 2)
    return Tile(top, left, height, width)


def tile_size(pyramid: Pyramid, scale: float) -> tuple[int, int]:
    """Returns the (height, width) of the tiles of a level, at most those of the image.

    Args:
      pyramid: The tiles of the image.
      scale: The level, one of `pyramid.scales`.
    """
    height, width = (
        min(max(1, round(scale * side)), limit)
        for side, limit in zip(pyramid.canvas, pyramid.image_size, strict=True)
    )
    return height, width


def tile_starts(side: int, tile_side: int, stride: int) -> Int64[np.ndarray, " n"]:
    """Returns where tiles start on a side of an image, the last one at its end.

    Args:
      side: Pixels of the image.
      tile_side: Pixels of a tile, at most `side`.
      stride: Pixels from a tile to the next one.
    """
    last = side - tile_side
    return np.append(np.arange(0, last, stride, dtype=np.int64), np.int64(last))


def _nearest_start(side: int, tile_side: int, center: float) -> int:
    starts = tile_starts(side, tile_side, max(1, int(STRIDE * tile_side)))
    return int(starts[np.argmin(np.abs(starts + tile_side / 2 - center))])


def _clip(pyramid: Pyramid, points: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Moves points, or the corners of a box, that are outside of the image to its border."""
    height, width = pyramid.image_size
    return np.clip(points.reshape(-1, 2), 0, (width, height)).reshape(points.shape)


def _bounds(points: Float[np.ndarray, "k 2"]) -> Float[np.ndarray, " 4"]:
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def _contains(pyramid: Pyramid, tile: Tile, box: Float[np.ndarray, " 4"], margin: float) -> bool:
    """Returns whether a tile contains a box with a margin, except at the sides of the image.

    Args:
      pyramid: The tiles of the image.
      tile: The tile.
      box: (x0, y0, x1, y1) in pixels of the image.
      margin: As a fraction of the tile's sides.
    """
    x0, y0, x1, y1 = box
    bottom, right = tile.top + tile.height, tile.left + tile.width
    dy, dx = margin * tile.height, margin * tile.width
    return bool(
        (y0 >= tile.top + dy or tile.top == 0)
        and (x0 >= tile.left + dx or tile.left == 0)
        and (y1 <= bottom - dy or bottom == pyramid.image_size[0])
        and (x1 <= right - dx or right == pyramid.image_size[1])
    )
