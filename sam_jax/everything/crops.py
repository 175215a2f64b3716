"""Plans grids of points and overlapping crops of the image.

Source: segment-anything `utils/amg.py` (build_point_grid, build_all_layer_point_grids,
generate_crop_boxes).

Differences: crops may be tiles of fixed sizes too.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import ArrayLike

from sam_jax.images.read import ImageError
from sam_jax.predict.tiles import plan_pyramid, tile_size, tile_starts

MIN_TILE_STRIDE = 1 / 4  # of a tile's side, even if overlap_ratio is larger


def build_point_grid(points_per_side: int) -> Float[np.ndarray, "n 2"]:
    """Returns the centers of `points_per_side` x `points_per_side` cells of the unit square.

    Args:
      points_per_side: Points in each row and column.

    Returns:
      (x, y) in [0, 1], row by row.
    """
    offset = 1 / (2 * points_per_side)
    side = np.linspace(offset, 1 - offset, points_per_side)
    return np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)


def build_point_grids(
    points_per_side: int, num_layers: int, downscale_factor: int
) -> list[Float[np.ndarray, "_ 2"]]:
    """Returns a grid of points for the image and one for each layer of crops.

    Args:
      points_per_side: Points in each row and column of the image's grid.
      num_layers: Layers of crops.
      downscale_factor: The factor by which points per side decrease from layer to layer.

    Raises:
      ValueError: If a layer has no points.
    """
    sides = [int(points_per_side / downscale_factor**layer) for layer in range(num_layers + 1)]
    if min(sides) < 1:
        raise ValueError(f"points_per_side must leave a point for each layer of crops; got {sides}")
    return [build_point_grid(side) for side in sides]


def check_point_grids(
    grids: Sequence[ArrayLike], num_layers: int
) -> list[Float[np.ndarray, "_ 2"]]:
    """Validates grids of points and copies them as float64.

    Args:
      grids: 'n 2' points (x, y) in [0, 1], a grid for the image and one for each layer of crops.
      num_layers: Layers of crops.

    Raises:
      ValueError: If a grid has another shape or points outside [0, 1], or if there are too few
        grids.
    """
    try:
        arrays = [np.array(grid, np.float64) for grid in grids]
    except (TypeError, ValueError) as error:
        raise ValueError(f"point_grids must be arrays 'n 2' of (x, y): {error}") from error
    for grid in arrays:
        if grid.ndim != 2 or grid.shape[1] != 2 or not len(grid):
            raise ValueError(f"point_grids must be arrays 'n 2' of (x, y); got {grid.shape}")
        if not ((grid >= 0) & (grid <= 1)).all():
            raise ValueError(f"point_grids must be in [0, 1]; got {grid.min()} to {grid.max()}")
    if len(arrays) <= num_layers:
        raise ValueError(
            f"point_grids must have a grid for the image and each of {num_layers} layers of crops; "
            f"got {len(arrays)}"
        )
    return arrays


@dataclasses.dataclass(frozen=True)
class Crop:
    """A rectangular part of an image.

    Attributes:
      box: (x0, y0, x1, y1) in pixels of the image; x1 and y1 are exclusive.
      layer: The grid of points: 0 for the full image and for tiles, 1 for the 2 x 2 crops of the
        image, 2 for its 4 x 4 crops and so on.
    """

    box: tuple[int, int, int, int]
    layer: int

    @property
    def corner(self) -> tuple[int, int]:
        """(x, y) of the top-left pixel."""
        return self.box[:2]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.box[3] - self.box[1], self.box[2] - self.box[0]

    def extract(self, image: Shaped[np.ndarray, "h w ..."]) -> Shaped[np.ndarray, "ch cw ..."]:
        """Returns a view of the crop's pixels.

        Args:
          image: The full image.
        """
        x0, y0, x1, y1 = self.box
        return image[y0:y1, x0:x1]


def plan_crops(size: tuple[int, int], num_layers: int, overlap_ratio: float) -> list[Crop]:
    """Returns the full image, then layers of 2 x 2, 4 x 4 and so on overlapping crops.

    Args:
      size: (height, width) of the image.
      num_layers: Layers of crops in addition to the full image.
      overlap_ratio: The overlap of the first layer's crops as a fraction of the image's shorter
        side. Each further layer halves it.

    Raises:
      ImageError: If the image is too small.
    """
    height, width = size
    crops = [Crop((0, 0, width, height), 0)]
    for layer in range(1, num_layers + 1):
        n = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / n))
        x_starts, crop_width = _split_side(width, n, overlap)
        y_starts, crop_height = _split_side(height, n, overlap)
        for x, y in itertools.product(x_starts, y_starts):
            box = (x, y, min(x + crop_width, width), min(y + crop_height, height))
            crops.append(Crop(box, layer))
    if any(min(crop.size) < 1 for crop in crops):
        raise ImageError(f"image must be large enough for {num_layers} layers of crops; got {size}")
    return crops


def plan_tile_crops(
    size: tuple[int, int],
    canvas: tuple[int, int],
    tiles: int | str | None,
    overlap_ratio: float,
) -> list[Crop]:
    """Returns overlapping tiles that cover an image, of one size or of several.

    Args:
      size: (height, width) of the image.
      canvas: (height, width) of the padded input that the model takes.
      tiles: The longer side of a tile in pixels of the image; "auto" for tiles of the canvas's
        size, in which the model sees each pixel at its size, and of 2, 4, ... times that, up to
        the image's; None for no tiles.
      overlap_ratio: The overlap of tiles as a fraction of their side.

    Returns:
      The tiles of each size, from small to large, without those that would cover the image.
    """
    if tiles == "auto":
        shrinkage = max(1, size[0] / canvas[0], size[1] / canvas[1])  # of the image on the canvas
        octaves = math.ceil(math.log2(shrinkage))
        sides: list[int | str | None] = [max(canvas) << octave for octave in range(octaves)]
    else:
        sides = [tiles]
    return [
        crop for side in sides for crop in _plan_tiles_of_side(size, canvas, side, overlap_ratio)
    ]


def _plan_tiles_of_side(
    size: tuple[int, int], canvas: tuple[int, int], side: int | str | None, overlap_ratio: float
) -> list[Crop]:
    """Returns tiles whose longer side is `side`; see `plan_tile_crops`."""
    pyramid = plan_pyramid(size, canvas, side)
    *finer, _ = pyramid.scales
    if not finer:
        return []
    height, width = tile_size(pyramid, finer[0])
    stride = max(1 - overlap_ratio, MIN_TILE_STRIDE)
    tops, lefts = (
        tile_starts(image_side, tile_side, max(1, round(stride * tile_side))).tolist()
        for image_side, tile_side in zip(size, (height, width), strict=True)
    )
    return [Crop((x, y, x + width, y + height), 0) for y, x in itertools.product(tops, lefts)]


def _split_side(side: int, n: int, overlap: int) -> tuple[list[int], int]:
    """Returns the starts of n overlapping parts of a side, and their common length."""
    length = math.ceil((overlap * (n - 1) + side) / n)
    return [(length - overlap) * i for i in range(n)], length
