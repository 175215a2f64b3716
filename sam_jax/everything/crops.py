"""Where everything mode looks: grids of points, and crops of the image.

Source: segment-anything `utils/amg.py` (build_point_grid, generate_crop_boxes).
"""

import dataclasses
import itertools
import math

import numpy as np

from sam_jax.images.read import ImageError


def point_grid(per_side):
    """Points (x, y) in the middle of `per_side` x `per_side` cells of [0, 1], x fastest: 'n 2'."""
    offset = 1 / (2 * per_side)
    side = np.linspace(offset, 1 - offset, per_side)
    return np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)


def make_grids(per_side, layers, factor):
    """Grids of points for the image, and for layers of crops that have `factor` fewer a side each.

    Raises:
      ValueError: if none are left.
    """
    sides = [int(per_side / factor**layer) for layer in range(layers + 1)]
    if min(sides) < 1:
        raise ValueError(f"points_per_side must leave a point for each layer of crops; got {sides}")
    return [point_grid(n) for n in sides]


def checked_grids(grids, layers):
    """Checks grids 'n 2' of points in [0, 1], one for the image and one for each layer of crops.

    Raises:
      ValueError: if one has another shape, or points outside, or if there are too few.
    """
    grids = [np.asarray(grid, np.float64) for grid in grids]
    for grid in grids:
        if grid.ndim != 2 or grid.shape[1] != 2 or not len(grid):
            raise ValueError(f"point_grids must be arrays 'n 2' of (x, y); got {grid.shape}")
        if not ((grid >= 0) & (grid <= 1)).all():
            raise ValueError(f"point_grids must be in [0, 1]; got {grid.min()} to {grid.max()}")
    if len(grids) <= layers:
        raise ValueError(
            f"point_grids must have a grid for the image and each of {layers} layers of crops; "
            f"got {len(grids)}"
        )
    return grids


@dataclasses.dataclass(frozen=True)
class Crop:
    """A part of an image.

    Attributes:
      box: (x0, y0, x1, y1), x1 and y1 outside; layer: 0 for the whole image, ...
    """

    box: tuple[int, int, int, int]
    layer: int

    @property
    def corner(self):
        """(x, y) of its first pixel."""
        return self.box[:2]

    @property
    def size(self):
        """(height, width)."""
        return self.box[3] - self.box[1], self.box[2] - self.box[0]

    def cut(self, image):
        """The part of 'h w 3'."""
        x0, y0, x1, y1 = self.box
        return image[y0:y1, x0:x1]


def plan_crops(size, layers, overlap_ratio):
    """The whole image, then layers of 2 x 2, 4 x 4, ... crops that overlap.

    Args:
      size: (height, width) of the image.
      layers: how many there are beside the whole image.
      overlap_ratio: of the shorter side, by how much crops of the first layer overlap; half of it
        for those of the second, and so on.
    Raises:
      ImageError: if the image is too small.
    """
    height, width = size
    crops = [Crop((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        n = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / n))
        starts, lengths = zip(*(_divide(side, n, overlap) for side in (width, height)), strict=True)
        for x, y in itertools.product(*starts):
            box = (x, y, min(x + lengths[0], width), min(y + lengths[1], height))
            crops.append(Crop(box, layer))
    if any(min(crop.size) < 1 for crop in crops):
        raise ImageError(f"image must be large enough for {layers} layers of crops; got {size}")
    return crops


def _divide(side, n, overlap):
    """The starts of n parts of a side that overlap, and their length."""
    length = math.ceil((overlap * (n - 1) + side) / n)
    return [(length - overlap) * i for i in range(n)], length
