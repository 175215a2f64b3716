"""The resolution of a model's masks: how well they could show objects at best.

A model predicts masks at a low resolution, `Sam.low_res`, from which they are resized to the image.
The bound of an object is the IoU with its true mask that is left when the true mask itself goes
through that resolution.
"""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from sam_jax.images.resize import fit_size, postprocess_masks
from sam_jax.masks.boxes import box_of_mask
from sam_jax.masks.overlap import mask_iou
from sam_jax.predict.tiles import plan_pyramid, tile_for_box

PERCENTILES = (10, 50, 90)


def resolution_bound(
    mask: Bool[np.ndarray, "h w"], canvas: tuple[int, int], low_res: tuple[int, int]
) -> float:
    """Computes the IoU of a mask with itself, averaged to the decoder's pixels and resized back.

    Args:
      mask: The mask, in pixels of the image.
      canvas: (height, width) of the model's input, into which the image is fitted.
      low_res: (height, width) of the model's masks.

    Returns:
      The IoU; 0 if nothing of the mask is left.
    """
    size = mask.shape[0], mask.shape[1]
    input_size = fit_size(size, canvas)
    rows = _average(size[0], input_size[0], canvas[0], low_res[0])
    columns = _average(size[1], input_size[1], canvas[1], low_res[1])
    coverage = rows @ mask @ columns.T
    logits = (coverage - 0.5).astype(np.float32)
    return float(mask_iou(postprocess_masks(logits, size, canvas) > 0, mask))


def cut_to_tile(
    mask: Bool[np.ndarray, "h w"], canvas: tuple[int, int], tiles: int | str | None
) -> Bool[np.ndarray, "tile_h tile_w"]:
    """Cuts a mask to the tile in which the model sees its object if it is prompted with the box.

    Args:
      mask: The mask, in pixels of the image.
      canvas: (height, width) of the model's input.
      tiles: See `plan_pyramid`. Without tiles the mask is not cut.

    Raises:
      ValueError: If `tiles` is invalid.
    """
    pyramid = plan_pyramid((mask.shape[0], mask.shape[1]), canvas, tiles)
    box = box_of_mask(mask).astype(np.float64)
    return mask[tile_for_box(pyramid, box, np.zeros((0, 2))).region]


def summarize_resolution(
    masks: Iterable[Bool[np.ndarray, "h w"]], canvas: tuple[int, int], low_res: tuple[int, int]
) -> dict[str, Any]:
    """Summarizes how large objects are for a model, and how well its masks could show them.

    Args:
      masks: Masks of any sizes, each in pixels of its image.
      canvas: (height, width) of the model's input.
      low_res: (height, width) of the model's masks.

    Returns:
      {"objects": their number, "side": {"10": ..., "50": ..., "90": ...}, percentiles of the longer
      side of the objects' boxes in the decoder's pixels, "bound": the mean of `resolution_bound`}.

    Raises:
      ValueError: If there is no mask.
    """
    sides, bounds = [], []
    for mask in masks:
        left, top, right, bottom = box_of_mask(mask)
        scale = fit_size(mask.shape, canvas)[0] / mask.shape[0] * low_res[0] / canvas[0]
        sides.append((max(right - left, bottom - top) + 1) * scale)
        bounds.append(resolution_bound(mask, canvas, low_res))
    if not bounds:
        raise ValueError("masks must hold at least one mask")
    percentiles = np.percentile(sides, PERCENTILES)
    return {
        "objects": len(bounds),
        "side": {str(p): round(float(v), 1) for p, v in zip(PERCENTILES, percentiles, strict=True)},
        "bound": round(float(np.mean(bounds)), 4),
    }


def format_resolution(summary: dict[str, Any]) -> str:
    """Formats a result of `summarize_resolution` as a line of text."""
    small, median, large = summary["side"].values()
    return (
        f"objects are {median} decoder pixels long (10th to 90th percentile: {small} to {large}); "
        f"at this resolution, masks can reach a mean IoU of {summary['bound']:.3f}"
    )


@functools.lru_cache(maxsize=8)
def _average(
    size: int, input_size: int, canvas: int, low_res: int
) -> Float64[np.ndarray, "{low_res} {size}"]:
    """Returns the matrix that averages an axis of an image over the decoder's pixels."""
    # Bounds of the decoder's pixels in pixels of the image. Those in the padding lie outside of it.
    bounds = np.arange(low_res + 1) * (canvas / low_res) * (size / input_size)
    pixels = np.arange(size)
    covered = np.clip(bounds[1:, None] - pixels, 0, 1) - np.clip(bounds[:-1, None] - pixels, 0, 1)
    return covered / (bounds[1] - bounds[0])
