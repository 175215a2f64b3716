"""Plans the tiles in which low-resolution masks are resized to their image.

Both bilinear resizes of a mask are linear and separable, and a pixel depends on few logits. So a
tile of pixels is a product of three small matrices: one for its rows, a window of the logits, and
one for its columns. The plan of these products consists of arrays of fixed shapes. The image's size
is therefore data, and one program serves all images whose sides exceed about 70 pixels.
"""

import functools

import flax.struct
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped

from sam_jax.images.resize import bilinear_taps, fit_size

TILE_SIZE = 128  # pixels per side
MAX_TILES = 128  # per side; the last one is never used
MAX_SIDE = TILE_SIZE * (MAX_TILES - 1)  # pixels of an image's side
UNUSED_TILE = MAX_TILES - 1
INT32_MAX = np.int32(np.iinfo(np.int32).max)


@flax.struct.dataclass
class Axis:
    """The tiles of one side of an image, padded to MAX_TILES.

    Axes: t tiles, i pixels of a tile. Unused tiles have no pixels.

    Attributes:
      step: The pixels that each tile covers, a multiple of 8 up to TILE_SIZE.
      num_pixels: The pixels of each tile that are in the image, at most `step`.
      first: The first logit that the tile depends on, INT32_MAX if it is unused.
      last: The last logit that the tile depends on, INT32_MAX if it is unused.
      start: The first logit of the tile's window.
      index: The four logits of the window that each pixel depends on.
      weight: Their weights.
      window: The number of logits in a window.
    """

    step: Int32[Array, ""] | np.int32
    num_pixels: Int32[Array | np.ndarray, " t"]
    first: Int32[Array | np.ndarray, " t"]
    last: Int32[Array | np.ndarray, " t"]
    start: Int32[Array | np.ndarray, " t"]
    index: Int32[Array | np.ndarray, "t i 4"]
    weight: Float32[Array | np.ndarray, "t i 4"]
    window: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Tiling:
    """The tiles of an image.

    Attributes:
      rows: Tiles of its height.
      columns: Tiles of its width.
    """

    rows: Axis
    columns: Axis


def plan_tiles(
    size: tuple[int, int],
    low_res_size: tuple[int, int],
    canvas: tuple[int, int],
    window: int | None,
) -> Tiling:
    """Plans the tiles of an image.

    Args:
      size: (height, width) of the image, each at most MAX_SIDE.
      low_res_size: (height, width) of the masks' logits.
      canvas: (height, width) of the padded input that the model takes.
      window: Rows and columns of logits that a tile may depend on, or None for all of them. Very
        small images use all of them in any case.

    Returns:
      Numpy arrays.
    """
    rows, columns = (
        _plan_axis(*sides, window)
        for sides in zip(size, low_res_size, canvas, fit_size(size, canvas), strict=True)
    )
    return Tiling(rows=rows, columns=columns)


@functools.lru_cache(maxsize=64)
def _plan_axis(size: int, low_res: int, canvas: int, input_size: int, window: int | None) -> Axis:
    """Plans one side of an image of `size` pixels, `input_size` once it is resized."""
    index, weight = _find_taps(size, low_res, canvas, input_size)
    window = min(window or low_res, low_res)
    step = _largest_step(index, window)
    if step is None:
        window, step = low_res, TILE_SIZE

    num_tiles = -(-size // step)
    pixel = np.minimum(np.arange(num_tiles)[:, None] * step + np.arange(TILE_SIZE), size - 1)
    first, last = index[pixel[:, 0], 0, 0], index[pixel[:, step - 1], 1, 1]
    start = np.minimum(first, low_res - window)
    relative_index = index[pixel].reshape(num_tiles, TILE_SIZE, 4) - start[:, None, None]
    num_pixels = np.minimum(step, size - np.arange(num_tiles) * step)
    return Axis(
        step=np.int32(step),
        num_pixels=_pad(num_pixels, 0).astype(np.int32),
        first=_pad(first, INT32_MAX).astype(np.int32),
        last=_pad(last, INT32_MAX).astype(np.int32),
        start=_pad(start, 0).astype(np.int32),
        index=_pad(relative_index, 0).astype(np.int32),
        weight=_pad(weight[pixel].reshape(num_tiles, TILE_SIZE, 4), 0).astype(np.float32),
        window=window,
    )


def _find_taps(
    size: int, low_res: int, canvas: int, input_size: int
) -> tuple[Int[np.ndarray, "size 2 2"], Float[np.ndarray, "size 2 2"]]:
    """Returns the four logits that each pixel depends on, and their weights.

    A pixel is between two pixels of the canvas, and each of these between two logits.
    """
    first, weight = bilinear_taps(input_size, size)
    low_first, low_weight = bilinear_taps(low_res, canvas)
    pair = np.stack([first, np.minimum(first + 1, input_size - 1)], axis=1)
    index = np.stack([low_first[pair], np.minimum(low_first[pair] + 1, low_res - 1)], axis=-1)
    pair_weight = np.stack([1 - weight, weight], axis=1)
    return index, pair_weight[:, :, None] * np.stack(
        [1 - low_weight[pair], low_weight[pair]], axis=-1
    )


def _largest_step(index: Int[np.ndarray, "size 2 2"], window: int) -> int | None:
    """Returns the largest tile whose logits always fit in a window, or None if there is none.

    The result is a multiple of 8, as tiles are packed into bytes, and at most TILE_SIZE.
    """
    for step in range(TILE_SIZE, 0, -8):
        first = index[::step, 0, 0]
        last_pixel = np.minimum(np.arange(len(first)) * step + step, len(index)) - 1
        if (index[last_pixel, 1, 1] - first < window).all():
            return step
    return None


def _pad(x: Shaped[np.ndarray, "used ..."], value: int | np.int32) -> Shaped[np.ndarray, "t ..."]:
    """Pads the first axis to MAX_TILES."""
    return np.concatenate([x, np.full((MAX_TILES - len(x), *x.shape[1:]), value, x.dtype)])
