"""The masks that are kept, from the device as bits and then as run lengths.

Only the tiles in a mask's box are painted, and the host reads nothing but changes in them.
"""

import dataclasses
import functools

import jax
import numpy as np
from einops import rearrange

from sam_jax.everything.candidates import NUM_MASKS, prompts_of
from sam_jax.everything.tiled_resize import UNUSED, Tiling, make_matrices, pack
from sam_jax.masks import rle

TILES = 64  # painted at a time


@dataclasses.dataclass(frozen=True)
class PendingMasks:
    """Some masks of a crop, on their way from the device.

    Attributes:
      masks: 'n' int, which ones, as in `Candidates`.
      tiles: 'n 2 2' int, the (row, column) of the first tile of each, and how many there are.
      bits: arrays 'k i/8 j' uint8 of the tiles, mask by mask and row by row, with some at the end
        that are nobody's.
      tiling: of the crop.
    """

    masks: np.ndarray
    tiles: np.ndarray
    bits: list[jax.Array]
    tiling: Tiling


def start_drawing(model, variables, embedding, points, masks, boxes, tiling, chunk):
    """Paints masks of a crop.

    Args:
      embedding: '1 gh gw c' of the crop; points: 'p 2' of it in pixels of the frame.
      masks: 'n' int, which ones, as in `Candidates`.
      boxes: 'n 4' int, theirs, in pixels of the crop.
      tiling: of the crop; chunk: points at a time.
    Returns:
      A list of `PendingMasks`s, which may still be under way.
    """
    drawings = []
    matrices = make_matrices(tiling)
    prompts = np.unique(masks // NUM_MASKS)
    for some in np.split(prompts, range(chunk, len(prompts), chunk)):
        padded = np.resize(some, chunk)
        logits = _decode(model, variables, embedding, points[padded])
        here = np.isin(masks // NUM_MASKS, some)
        place = (
            np.searchsorted(some, masks[here] // NUM_MASKS) * NUM_MASKS + masks[here] % NUM_MASKS
        )
        tiles = _tiles_of(boxes[here], tiling)
        drawings.append(
            PendingMasks(masks[here], tiles, _pack(logits, place, tiles, tiling, matrices), tiling)
        )
    return drawings


def finish_drawing(drawing, corner, size):
    """Waits for a `PendingMasks`.

    Args:
      corner: (x, y) of the crop in the image; size: (height, width) of the image.
    Returns:
      {number in `Candidates`: (run lengths, '4' int box (left, top, right, bottom))} in the image.
    """
    bits = np.concatenate(jax.device_get(drawing.bits))
    step_y, step_x = int(drawing.tiling.rows.step), int(drawing.tiling.columns.step)
    masks, start = {}, 0
    for mask, ((row, column), (down, across)) in zip(drawing.masks, drawing.tiles, strict=True):
        part = bits[start : start + down * across, : step_y // 8, :step_x]
        start += down * across
        part = rearrange(part, "(down across) i j -> (across j) (down i)", down=down)
        place = (corner[0] + int(column) * step_x, corner[1] + int(row) * step_y)
        masks[int(mask)] = rle.encode_bits(part, place, size), _box_of_bits(part, place)
    return masks


@functools.partial(jax.jit, static_argnames="model")
def _decode(model, variables, embedding, points):
    """The logits '(n m) lh lw' of points 'n 2'."""
    logits = model.apply(variables, embedding, prompts_of(points), method="decode").logits
    return rearrange(logits[0, :, -NUM_MASKS:], "n m lh lw -> (n m) lh lw")


def _box_of_bits(bits, corner):
    """The box of bits 'w h/8', whose corner is (x, y); zeros if there are none."""
    columns = np.flatnonzero(bits.any(axis=1))
    rows = np.flatnonzero(np.unpackbits(np.bitwise_or.reduce(bits, axis=0), bitorder="little"))
    if not len(rows):
        return np.zeros(4, int)
    return np.array([columns[0], rows[0], columns[-1], rows[-1]]) + np.tile(corner, 2)


def _tiles_of(boxes, tiling):
    """The tiles that boxes 'n 4' reach into, see `PendingMasks`."""
    step = np.array([tiling.rows.step, tiling.columns.step])
    first, last = boxes[:, [1, 0]] // step, boxes[:, [3, 2]] // step
    return np.stack([first, last - first + 1], axis=1)


def _pack(logits, places, tiles, tiling, matrices):
    """The bits of the tiles of masks at some places in the logits."""
    items = [
        (place, row + i, column + j)
        for place, ((row, column), (down, across)) in zip(places, tiles, strict=True)
        for i in range(down)
        for j in range(across)
    ]
    items += [(0, UNUSED, UNUSED)] * (-len(items) % TILES)
    batches = np.array(items, np.int32).reshape(-1, TILES, 3)
    return [pack(logits, *batch.T, tiling, matrices) for batch in batches]
