"""Random windows of resized images: large-scale jitter, and windows around objects.

Source: detectron2's `ResizeScale` and `FixedSizeCrop`, as ViTDet uses them in
`coco_loader_lsj.py`.

Differences: The two offsets of a window are independent. Detectron2 draws one number for both, so
that its windows lie on a diagonal. The scale may also be relative to the image's pixels or to an
object.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sam_jax.images.resize import MAX_ZOOM

Unit = Literal["canvas", "pixel", "object"]


class Window(NamedTuple):
    """A part of a resized image.

    Attributes:
      resized: (height, width) of the entire image after it is resized.
      top: The window's first row.
      left: The window's first column.
      height: The window's number of rows.
      width: The window's number of columns.
    """

    resized: tuple[int, int]
    top: int
    left: int
    height: int
    width: int


def sample_window(
    size: tuple[int, int],
    canvas: tuple[int, int],
    scales: tuple[float, float],
    unit: Unit,
    box: tuple[int, int, int, int] | None,
    rng: np.random.Generator,
) -> Window:
    """Samples the scale of an image, and a window of at most the canvas' size.

    Args:
      size: (height, width) of the image.
      canvas: (height, width) of the model's input.
      scales: The smallest and the largest scale. A scale of 1 means, by `unit`, that the image just
        fits into the canvas, that the image keeps its size, or that the object just fits. Around
        objects, a pixel is enlarged at most MAX_ZOOM times.
      unit: The unit of the scale.
      box: (left, top, right, bottom) of an object that the window must contain, both corners inside
        the box; None for any window. It is needed for the unit "object".
      rng: The source of randomness: a scale, then a vertical and a horizontal offset.

    Returns:
      The window.
    """
    ratio = rng.uniform(*scales)
    if unit == "canvas":
        ratio *= min(canvas[0] / size[0], canvas[1] / size[1])
    elif unit == "object":
        assert box is not None
        sides = box[3] - box[1] + 1, box[2] - box[0] + 1
        ratio = min(MAX_ZOOM, ratio * min(canvas[0] / sides[0], canvas[1] / sides[1]))
    resized = max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))
    offsets = []
    for axis in range(2):
        first, last = 0, max(0, resized[axis] - canvas[axis])
        if box is not None:
            scale = resized[axis] / size[axis]
            start, stop = box[1 - axis] * scale, (box[3 - axis] + 1) * scale
            # All offsets for which the object is inside, or the nearest one if it is too long.
            first, last = (
                min(max(first, round(stop) - canvas[axis]), last),
                max(min(last, int(start)), first),
            )
        offsets.append(first + round(rng.uniform() * (last - first)))
    top, left = offsets
    visible = min(resized[0], canvas[0]), min(resized[1], canvas[1])
    return Window(resized, top, left, *visible)


def cut_image(
    image: UInt8[np.ndarray, "h w 3"], window: Window
) -> UInt8[np.ndarray, "{window.height} {window.width} 3"]:
    """Resizes the part of an image that a window shows, with Pillow's bilinear filter.

    The result is the window of the resized image, up to the rounding of its corners. The rest of
    the image is not resized.
    """
    down = image.shape[0] / window.resized[0]
    right = image.shape[1] / window.resized[1]
    box = (
        window.left * right,
        window.top * down,
        min(image.shape[1], (window.left + window.width) * right),
        min(image.shape[0], (window.top + window.height) * down),
    )
    size = window.width, window.height
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, box=box))
