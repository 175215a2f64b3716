"""A mask drawn over its image with the prompts that asked for it, or all masks of an image."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask

COLOR = np.array((30, 144, 255))  # of the mask
FOREGROUND, BACKGROUND, BOX = (0, 200, 83), (229, 57, 53), (255, 193, 7)


def draw_overlay(image, mask, points=(), labels=(), box=None):
    """Tints a mask, outlines it, and marks the prompts.

    Args:
      image: 'h w 3' uint8.
      mask: 'h w' bool.
      points: 'k 2' (x, y) in pixels of the image; labels: 'k', 1 foreground and 0 background.
      box: (x0, y0, x1, y1) in pixels of the image, or None.
    Returns:
      'h w 3' uint8.
    """
    width = max(2, round(max(image.shape[:2]) / 400))  # of a line, in pixels
    inner = ndimage.binary_erosion(mask, iterations=width)
    drawn = np.where(mask[..., None], 0.5 * image + 0.5 * COLOR, image)
    drawn = np.where((mask & ~inner)[..., None], 255, drawn)
    picture = Image.fromarray(np.round(drawn).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    if box is not None:
        draw.rectangle([float(side) for side in box], outline=BOX, width=width)
    for (x, y), label in zip(points, labels, strict=True):
        color = FOREGROUND if label else BACKGROUND
        draw.circle((x, y), 4 * width, fill=color, outline="white", width=width)
    return np.asarray(picture)


TINT = 0.45  # how much of a pixel is the color of its mask
TURN = (5**0.5 - 1) / 2  # of the circle of hues, from a mask to the next: no two are ever alike


def draw_masks(image, masks):
    """Tints every mask in a color of its own, small ones above large ones, and outlines them.

    Args:
      image: 'h w 3' uint8.
      masks: run lengths or 'h w' bool each, of the image's size, in any order; empty ones and none
        at all will do.
    Returns:
      'h w 3' uint8, the same for the same masks.
    Raises:
      ValueError: if a mask is of another size, or its run lengths are broken.
    """
    size = image.shape[:2]
    parts = [part for mask in masks if (part := _part(mask, size)) is not None]
    parts.sort(key=lambda part: (-np.count_nonzero(part[2]), *part[:2]))
    top = np.zeros(size, np.int32)  # the mask that is seen: its place in `parts`, from 1
    edge = np.zeros(size, bool)
    width = max(1, round(max(size) / 1000))  # of an outline, in pixels
    for i, (y, x, part) in enumerate(parts, start=1):
        box = np.s_[y : y + part.shape[0], x : x + part.shape[1]]
        top[box][part] = i
        edge[box][part] = _outline(part, width)[part]
    colors = np.array([(0, 0, 0)] + [_color(i) for i in range(len(parts))], np.float32)
    tint = np.where(edge, 0.8, np.where(top > 0, TINT, 0)).astype(np.float32)[..., None]
    drawn = (1 - tint) * image + tint * np.where(edge[..., None], 255, colors[top])
    return np.round(drawn).astype(np.uint8)


def _part(mask, size):
    """A mask as (top, left, 'h w' bool) of its box alone, or None if it is empty."""
    found = mask.shape if isinstance(mask, np.ndarray) else tuple(mask["size"])
    if found != size:
        raise ValueError(f"masks must be of the image's size {size}; got {found}")
    left, columns = (0, mask) if isinstance(mask, np.ndarray) else _paint_columns(mask)
    if not columns.any():
        return None
    x0, y0, x1, y1 = box_of_mask(columns)
    return y0, left + x0, columns[y0 : y1 + 1, x0 : x1 + 1]


def _paint_columns(mask):
    """Paints run lengths from their first column on to their last -> the first, and 'h w' bool."""
    lengths, (height, width) = rle.runs(mask), mask["size"]
    odd = len(lengths) % 2  # then the last run is outside of the mask
    left = lengths[0] // height
    right = -(-lengths[: len(lengths) - odd].sum() // height) if len(lengths) > 1 else left
    lengths[0] -= left * height
    lengths[-1] -= (width - right) * height
    inside = np.arange(len(lengths)) % 2 == 1
    return left, np.repeat(inside, lengths).reshape(right - left, height).T


def _outline(part, width):
    """The pixels of a mask that are within `width` of others, counted along rows and columns."""
    inner = np.pad(part, 1)
    for _ in range(width):
        beside = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        inner[1:-1, 1:-1] &= beside
    return part & ~inner[1:-1, 1:-1]


def _color(i):
    """The i-th color, RGB to 255: hues far from those before, in three brightnesses."""
    return [255 * c for c in colorsys.hsv_to_rgb(i * TURN % 1, 0.9, (1.0, 0.8, 0.9)[i % 3])]
