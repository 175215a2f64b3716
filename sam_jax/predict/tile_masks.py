"""Compares masks of different tiles, moves logits between tiles, and puts masks into the image."""

import hashlib
import math
from collections import OrderedDict

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

from sam_jax.images.resize import fit_size
from sam_jax.masks.boxes import box_of_mask
from sam_jax.predict.tiles import Pyramid, Tile

STABILITY_OFFSET = 1.0  # distance from 0 of the levels that the stability score compares
SMALL_SHARE = 0.4  # of a tile's side; shorter masks are better seen in a finer tile
MIN_SHARE_FACTOR = 0.2  # on the score of the smallest masks
CUT_MASK_FACTOR = 0.5  # on the score of a mask that a side of its tile cuts off
REMEMBERED_MASKS = 1 << 16  # about 10 MB
OUTSIDE_LOGIT = -100.0  # of pixels outside of an object's tile, where no mask is predicted


class MaskTiles:
    """Remembers in which tile low-resolution logits were predicted, by a hash of their bytes.

    The latest REMEMBERED_MASKS are kept. If several tiles gave equal logits, the last counts.
    """

    def __init__(self) -> None:
        """Remembers nothing yet."""
        self._tiles: OrderedDict[bytes, Tile] = OrderedDict()

    def add(self, logits: Float32[np.ndarray, "m lh lw"], tile: Tile) -> None:
        """Remembers the tile of an object's masks."""
        for mask in logits:
            key = _digest(mask)
            self._tiles.pop(key, None)
            self._tiles[key] = tile
        while len(self._tiles) > REMEMBERED_MASKS:
            self._tiles.popitem(last=False)

    def find(self, logits: Float32[np.ndarray, "lh lw"]) -> Tile:
        """Returns the tile of the logits of a prompt's mask_input.

        Raises:
          ValueError: If they are unknown.
        """
        tile = self._tiles.get(_digest(logits))
        if tile is None:
            raise ValueError(
                "mask_input must be the unchanged low-resolution logits of an earlier prediction "
                "on this image, which identify its tile; these are unknown"
            )
        return tile


def score_masks(
    logits: Float32[np.ndarray, "m lh lw"],
    iou: Float32[np.ndarray, " m"],
    tile: Tile,
    pyramid: Pyramid,
) -> float:
    """Returns how well a tile shows an object: the highest score of its masks.

    A mask's score is its predicted IoU times its stability score, the IoU of the masks at
    STABILITY_OFFSET above and below 0, measured on the logits without padding. Masks that touch a
    side of the tile inside the image are cut off and count CUT_MASK_FACTOR as much. Masks that are
    shorter than SMALL_SHARE of the tile count in proportion to their length.

    Args:
      logits: The object's masks.
      iou: Their predicted IoUs.
      tile: The tile that they were predicted in.
      pyramid: The tiles of the image.
    """
    height, width = _used_size(tile, pyramid.canvas, (logits.shape[1], logits.shape[2]))
    logits = logits[:, : math.ceil(height), : math.ceil(width)]
    below = (logits > -STABILITY_OFFSET).sum(axis=(1, 2))
    stability = (logits > STABILITY_OFFSET).sum(axis=(1, 2)) / np.maximum(below, 1)
    is_cut = _touches_inner_side(logits > 0, tile, pyramid.image_size)
    length = _longer_sides(logits > 0) / max(height, width)
    factor = np.clip(length / SMALL_SHARE, MIN_SHARE_FACTOR, 1)
    return float(np.max(iou * stability * factor * np.where(is_cut, CUT_MASK_FACTOR, 1)))


def mask_corners(
    logits: Float32[np.ndarray, "lh lw"], tile: Tile, canvas: tuple[int, int]
) -> Float[np.ndarray, "corners 2"]:
    """Returns two corners (x, y), in pixels of the image, of the box of a low-resolution mask.

    Args:
      logits: The mask.
      tile: The tile that it was predicted in.
      canvas: (height, width) of the padded input that the model takes.

    Returns:
      No corners if the mask is empty.
    """
    height, width = _used_size(tile, canvas, (logits.shape[0], logits.shape[1]))
    rows, columns = np.nonzero(logits[: math.ceil(height), : math.ceil(width)] > 0)
    if not len(rows):
        return np.zeros((0, 2))
    corners = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]])
    corners = np.minimum(corners, (width, height))
    return corners * np.array([tile.width / width, tile.height / height]) + tile.corner


def move_logits(
    logits: Float32[np.ndarray, "lh lw"], source: Tile, target: Tile, canvas: tuple[int, int]
) -> Float32[np.ndarray, "lh lw"]:
    """Resamples low-resolution logits from one tile to another, bilinearly.

    Args:
      logits: The logits in the tile `source`.
      source: The tile that they were predicted in.
      target: The other tile.
      canvas: (height, width) of the padded input that the model takes.

    Returns:
      The logits in the tile `target`; the lowest of `logits`, or -1 if that is lower, where it is
      outside of `source`.
    """
    size = logits.shape[0], logits.shape[1]
    used, new = (_used_size(tile, canvas, size) for tile in (source, target))
    weights, is_inside = [], []
    for axis in (0, 1):
        pixel = (np.arange(size[axis]) + 0.5) * target.size[axis] / new[axis] + target[axis]
        position = (pixel - source[axis]) * used[axis] / source.size[axis] - 0.5
        is_inside.append((position >= -0.5) & (position < used[axis] - 0.5))
        weights.append(_bilinear_weights(np.clip(position, 0, max(used[axis] - 1, 0)), size[axis]))
    outside = min(float(logits.min()), -1.0)
    moved = weights[0] @ logits @ weights[1].T
    return np.where(np.logical_and.outer(*is_inside), moved, outside).astype(np.float32)


def paste(
    image: Bool[np.ndarray, "m h w"] | Float32[np.ndarray, "m h w"],
    masks: Bool[np.ndarray, "m th tw"] | Float32[np.ndarray, "m th tw"],
    tile: Tile,
) -> None:
    """Writes masks or logits of a tile into those of the image.

    Args:
      image: Overwritten: False, or OUTSIDE_LOGIT, outside of the tile.
      masks: Those of the tile.
      tile: The tile.
    """
    if image.shape != masks.shape:
        image[:] = False if image.dtype == bool else OUTSIDE_LOGIT
    image[(slice(None), *tile.region)] = masks


def _digest(mask: Float32[np.ndarray, "lh lw"]) -> bytes:
    return hashlib.blake2b(mask.tobytes(), digest_size=16).digest()


def _used_size(
    tile: Tile, canvas: tuple[int, int], low_res: tuple[int, int]
) -> tuple[float, float]:
    """Returns the (height, width) of low-resolution logits that are not padding."""
    height, width = fit_size(tile.size, canvas)
    return height * low_res[0] / canvas[0], width * low_res[1] / canvas[1]


def _bilinear_weights(
    position: Float[np.ndarray, " new"], size: int
) -> Float[np.ndarray, "new {size}"]:
    """Returns the matrix that interpolates `size` values at positions from 0 to `size` - 1."""
    return np.maximum(1 - np.abs(position[:, None] - np.arange(size)), 0)


def _longer_sides(masks: Bool[np.ndarray, "m lh lw"]) -> Int64[np.ndarray, " m"]:
    """Returns the longer side of each mask's bounding box; 0 for an empty mask."""
    left, top, right, bottom = box_of_mask(masks).T
    longer = np.maximum(right - left, bottom - top) + 1
    return np.where(masks.any(axis=(1, 2)), longer, 0)


def _touches_inner_side(
    masks: Bool[np.ndarray, "m lh lw"], tile: Tile, image_size: tuple[int, int]
) -> Bool[np.ndarray, " m"]:
    """Returns whether masks touch a side of their tile that is none of the image's."""
    rows, columns = np.asarray(masks.any(axis=2)), np.asarray(masks.any(axis=1))
    bottom, right = tile.top + tile.height, tile.left + tile.width
    return (
        (rows[:, 0] & (tile.top > 0))
        | (rows[:, -1] & (bottom < image_size[0]))
        | (columns[:, 0] & (tile.left > 0))
        | (columns[:, -1] & (right < image_size[1]))
    )
