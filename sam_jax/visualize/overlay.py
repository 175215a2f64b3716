"""Masks drawn over an image: one mask with its prompts, or all masks of the image."""

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw
from scipy import ndimage

from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask

# RGB
MASK_COLOR = (30, 144, 255)
FOREGROUND_COLOR, BACKGROUND_COLOR, BOX_COLOR = (0, 200, 83), (229, 57, 53), (255, 193, 7)
OUTLINE_COLOR = (255, 255, 255)

OVERLAY_OPACITY = 0.5  # of the mask in `draw_overlay`
MASKS_OPACITY, OUTLINE_OPACITY = 0.5, 0.8  # in `draw_masks`
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in the brightness (ITU-R BT.601)
HUE_STEP = (5**0.5 - 1) / 2  # the golden ratio: no two of any number of hues are close


def draw_overlay(
    image: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    points: np.ndarray | Sequence[Any] = (),
    labels: np.ndarray | Sequence[int] = (),
    box: np.ndarray | Sequence[Any] | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """Tints a mask, outlines it, and marks the prompts.

    Args:
      image: The image.
      mask: The mask.
      points: (x, y) of each point in pixels of the image, 'k 2'.
      labels: The label of each point, 'k': 1 foreground, 0 background.
      box: (x0, y0, x1, y1) in pixels of the image, or None.

    Returns:
      A new image.

    Raises:
      ValueError: If points and labels differ in number.
    """
    line_width = max(2, round(max(image.shape[:2]) / 400))  # pixels
    inner = ndimage.binary_erosion(mask, iterations=line_width)
    tinted = (1 - OVERLAY_OPACITY) * image + OVERLAY_OPACITY * np.array(MASK_COLOR)
    pixels = np.where(mask[..., None], tinted, image)
    pixels = np.where((mask & ~inner)[..., None], OUTLINE_COLOR, pixels)
    picture = Image.fromarray(np.round(pixels).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    if box is not None:
        draw.rectangle(np.asarray(box, float).tolist(), outline=BOX_COLOR, width=line_width)
    for (x, y), label in zip(np.asarray(points, float), np.asarray(labels), strict=True):
        color = FOREGROUND_COLOR if label else BACKGROUND_COLOR
        draw.circle((x, y), 4 * line_width, fill=color, outline=OUTLINE_COLOR, width=line_width)
    return np.asarray(picture)


def draw_masks(
    image: UInt8[np.ndarray, "h w 3"],
    masks: Iterable[Bool[np.ndarray, "_ _"] | Mapping[str, Any]],
) -> UInt8[np.ndarray, "h w 3"]:
    """Tints each mask in a different color, small ones above large ones, and outlines them.

    The image below the masks is gray, so that every color is a mask's and not an object's.

    Args:
      image: The image.
      masks: Masks of the image's size as arrays or run lengths, in any order. They may be empty.

    Returns:
      A new image, which does not depend on the order of the masks.

    Raises:
      ValueError: If a mask differs in size from the image, or its run lengths are broken.
    """
    size = image.shape[:2]
    cutouts = [cutout for mask in masks if (cutout := _cut_out(mask, size)) is not None]
    cutouts.sort(key=lambda cutout: (-np.count_nonzero(cutout[2]), *cutout[:2]))
    top_mask = np.zeros(size, np.int32)  # the number of the visible mask, from 1; 0 is none
    is_outline = np.zeros(size, bool)
    line_width = max(1, round(max(size) / 1000))  # pixels
    for i, (y, x, mask) in enumerate(cutouts, start=1):
        box = np.s_[y : y + mask.shape[0], x : x + mask.shape[1]]
        top_mask[box][mask] = i
        is_outline[box][mask] = _outline(mask, line_width)[mask]
    colors = np.array([(0, 0, 0)] + [_mask_color(i) for i in range(len(cutouts))], np.float32)
    opacity = np.where(is_outline, OUTLINE_OPACITY, np.where(top_mask > 0, MASKS_OPACITY, 0))
    opacity = opacity.astype(np.float32)[..., None]
    overlay = np.where(is_outline[..., None], 255, colors[top_mask])
    gray = (image @ np.array(LUMA, np.float32))[..., None]
    return np.round((1 - opacity) * gray + opacity * overlay).astype(np.uint8)


def _cut_out(
    mask: Bool[np.ndarray, "_ _"] | Mapping[str, Any], size: tuple[int, ...]
) -> tuple[int, int, Bool[np.ndarray, "_ _"]] | None:
    """Returns (top, left, pixels) of the bounding box of a mask, or None if it is empty."""
    mask_size = mask.shape if isinstance(mask, np.ndarray) else tuple(mask["size"])
    if mask_size != size:
        raise ValueError(f"masks must be of the image's size {size}; got {mask_size}")
    left, columns = (0, mask) if isinstance(mask, np.ndarray) else _decode_columns(mask)
    if not columns.any():
        return None
    x0, y0, x1, y1 = box_of_mask(columns)
    return int(y0), int(left + x0), columns[y0 : y1 + 1, x0 : x1 + 1]


def _decode_columns(mask: Mapping[str, Any]) -> tuple[int, Bool[np.ndarray, "h w"]]:
    """Decodes run lengths from the first column of the mask to the last; returns its left edge."""
    lengths, (height, width) = rle.runs(mask), mask["size"]
    ends_outside = len(lengths) % 2  # runs alternate, and the first one is outside of the mask
    left = int(lengths[0]) // height
    end = lengths[: len(lengths) - ends_outside].sum()
    right = -(-end // height) if len(lengths) > 1 else left
    lengths[0] -= left * height
    lengths[-1] -= (width - right) * height
    is_inside = np.arange(len(lengths)) % 2 == 1
    return left, np.repeat(is_inside, lengths).reshape(right - left, height).T


def _outline(mask: Bool[np.ndarray, "h w"], width: int) -> Bool[np.ndarray, "h w"]:
    """Returns the pixels of a mask within `width` of its border, along rows and columns."""
    inner = np.pad(mask, 1)
    for _ in range(width):
        all_neighbors = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        inner[1:-1, 1:-1] &= all_neighbors
    return mask & ~inner[1:-1, 1:-1]


def _mask_color(i: int) -> list[float]:
    """Returns the RGB color of the i-th mask, 0 to 255, in one of three brightnesses."""
    brightness = (1.0, 0.8, 0.9)[i % 3]
    return [255 * c for c in colorsys.hsv_to_rgb(i * HUE_STEP % 1, 0.9, brightness)]
