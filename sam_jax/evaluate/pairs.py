"""Two sources of the same images: the masks of one beside those of the other."""

from collections.abc import Sequence

import numpy as np

from sam_jax.data.example import RLE, BadSample, Source
from sam_jax.masks import overlap, rle


def read_masks(source: Source, index: int) -> Sequence[RLE]:
    """The masks of an image; none where that is why the source has no such example.

    Raises:
      BadSample: if it is unusable for another reason.
    """
    try:
        return source[index].masks
    except BadSample as error:
        if error.reason == "no masks":
            return []
        raise


def iou_of_both(name: str, first: Sequence[RLE], second: Sequence[RLE]) -> np.ndarray:
    """The IoU of each mask of an image in one source with each in the other.

    Args:
      name: of the image, for errors; first: n masks; second: k masks.
    Returns:
      'n k' float64.
    Raises:
      BadSample: if a mask is broken.
      ValueError: if they differ in size, so that the images are not the same.
    """
    try:
        return overlap.iou(first, second)
    except rle.RLEError as error:
        raise BadSample("broken mask", str(error)) from error
    except ValueError as error:
        raise ValueError(f"{name}, of which both sources should have masks: {error}") from error
