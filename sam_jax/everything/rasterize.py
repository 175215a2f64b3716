"""Decodes the masks that are kept, takes them from the device as bits, and makes run lengths.

Only the tiles that a mask's box touches are computed, and the host looks only for changes in their
bits.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int, UInt8

from sam_jax.everything.candidates import NUM_MULTIMASK_OUTPUTS, point_prompts
from sam_jax.everything.tiled_resize import Matrices, make_matrices, pack_tiles
from sam_jax.everything.tiling import UNUSED_TILE, Tiling
from sam_jax.masks import rle
from sam_jax.model.mask_decoder import Masks
from sam_jax.model.sam import Sam

TILES_PER_BATCH = 64  # packed in one program


@dataclasses.dataclass(frozen=True, eq=False)
class PendingMasks:
    """Masks of a crop, possibly still being computed asynchronously.

    Attributes:
      candidates: The index of each mask in `Candidates`.
      tiles: The (row, column) of each mask's first tile, and its numbers of tile rows and columns.
      bits: Batches of packed tiles, see `pack_tiles`: mask by mask, row by row, and unused ones at
        the end.
      tiling: The tiles of the crop.
    """

    candidates: Int[np.ndarray, " n"]
    tiles: Int[np.ndarray, "n 2 2"]
    bits: list[UInt8[Array, "b _ j"]]
    tiling: Tiling


def start_rasterizing(
    model: Sam,
    variables: dict[str, Any],
    embedding: Float[Array, "1 gh gw c"],
    points: Float32[np.ndarray, "p 2"],
    candidates: Int[np.ndarray, " n"],
    boxes: Int[np.ndarray, "n 4"],
    tiling: Tiling,
    *,
    points_per_batch: int,
) -> list[PendingMasks]:
    """Starts to compute masks of a crop, without waiting for them.

    Args:
      model: The model.
      variables: Its variables.
      embedding: The crop's embedding.
      points: All points of the crop, (x, y) in pixels of the canvas.
      candidates: The index of each mask in `Candidates`.
      boxes: The masks' boxes in pixels of the crop.
      tiling: The tiles of the crop.
      points_per_batch: The number of points that are decoded at a time.
    """
    pending = []
    matrices = make_matrices(tiling)
    point, output = np.divmod(candidates, NUM_MULTIMASK_OUTPUTS)
    prompts = np.unique(point)
    for batch in np.split(prompts, range(points_per_batch, len(prompts), points_per_batch)):
        padded = np.resize(batch, points_per_batch)
        logits = _decode_points(model, variables, embedding, points[padded])
        in_batch = np.isin(point, batch)
        index = np.searchsorted(batch, point[in_batch]) * NUM_MULTIMASK_OUTPUTS + output[in_batch]
        tiles = _tiles_of_boxes(boxes[in_batch], tiling)
        bits = _pack_masks(logits, index, tiles, tiling, matrices)
        pending.append(PendingMasks(candidates[in_batch], tiles, bits, tiling))
    return pending


def finish_rasterizing(
    pending: PendingMasks, corner: tuple[int, int], size: tuple[int, int]
) -> dict[int, tuple[dict[str, Any], Int[np.ndarray, " 4"]]]:
    """Waits for masks and converts them to run lengths.

    Args:
      pending: The masks.
      corner: (x, y) of the crop in the image.
      size: (height, width) of the image.

    Returns:
      For each index in `Candidates`, the mask's run lengths and its box (left, top, right, bottom),
      both in the image.
    """
    bits = np.concatenate(jax.device_get(pending.bits))
    step_y, step_x = int(pending.tiling.rows.step), int(pending.tiling.columns.step)
    masks = {}
    start = 0
    for candidate, ((row, column), (num_rows, num_columns)) in zip(
        pending.candidates, pending.tiles, strict=True
    ):
        end = start + num_rows * num_columns
        mask_bits = rearrange(
            bits[start:end, : step_y // 8, :step_x],
            "(rows columns) i j -> (columns j) (rows i)",
            rows=num_rows,
        )
        start = end
        mask_corner = (corner[0] + int(column) * step_x, corner[1] + int(row) * step_y)
        segmentation = rle.encode_bits(mask_bits, mask_corner, size)
        masks[int(candidate)] = segmentation, _box_of_bits(mask_bits, mask_corner)
    return masks


@functools.partial(jax.jit, static_argnames="model")
def _decode_points(
    model: Sam,
    variables: dict[str, Any],
    embedding: Float[Array, "1 gh gw c"],
    points: Float32[Array, "p 2"],
) -> Float32[Array, "3*p lh lw"]:
    """Returns the low-resolution logits of the points' masks."""
    masks = cast(Masks, model.apply(variables, embedding, point_prompts(points), method="decode"))
    return rearrange(masks.logits[0, :, -NUM_MULTIMASK_OUTPUTS:], "p m lh lw -> (p m) lh lw")


def _box_of_bits(bits: UInt8[np.ndarray, "w _"], corner: tuple[int, int]) -> Int[np.ndarray, " 4"]:
    """Returns the box of a transposed mask of eight rows per byte, or zeros if it is empty."""
    columns = np.flatnonzero(bits.any(axis=1))
    rows = np.flatnonzero(np.unpackbits(np.bitwise_or.reduce(bits, axis=0), bitorder="little"))
    if not len(rows):
        return np.zeros(4, int)
    return np.array([columns[0], rows[0], columns[-1], rows[-1]]) + np.tile(corner, 2)


def _tiles_of_boxes(boxes: Int[np.ndarray, "n 4"], tiling: Tiling) -> Int[np.ndarray, "n 2 2"]:
    """Returns the tiles that boxes touch. See `PendingMasks`."""
    step = np.array([tiling.rows.step, tiling.columns.step])
    first, last = boxes[:, [1, 0]] // step, boxes[:, [3, 2]] // step
    return np.stack([first, last - first + 1], axis=1)


def _pack_masks(
    logits: Float32[Array, "q lh lw"],
    index: Int[np.ndarray, " n"],
    tiles: Int[np.ndarray, "n 2 2"],
    tiling: Tiling,
    matrices: Matrices,
) -> list[UInt8[Array, "b _ j"]]:
    """Returns the packed tiles of the masks at an index in the logits. See `PendingMasks`."""
    items = [
        (i, row + tile_row, column + tile_column)
        for i, ((row, column), (num_rows, num_columns)) in zip(index, tiles, strict=True)
        for tile_row in range(num_rows)
        for tile_column in range(num_columns)
    ]
    items += [(0, UNUSED_TILE, UNUSED_TILE)] * (-len(items) % TILES_PER_BATCH)
    batches = np.array(items, np.int32).reshape(-1, TILES_PER_BATCH, 3)
    return [pack_tiles(logits, *batch.T, tiling, matrices) for batch in batches]
