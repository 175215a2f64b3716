"""A mask drawn over its image, with the prompts that asked for it. Numpy and Pillow only."""

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

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
