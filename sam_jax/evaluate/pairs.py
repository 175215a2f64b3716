"""The masks of an image in two sources of the same images."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sam_jax.data.example import RLE, BadSample, Source
from sam_jax.masks import overlap, rle

MASKS_ONLY = (256, 256)  # pass as `reduce_to` if only masks are used: images are decoded small


def read_masks(source: Source, index: int) -> Sequence[RLE]:
    """Reads the masks of an image; an image without masks has an empty list.

    Raises:
      BadSample: If the image is unusable for another reason.
    """
    try:
        return source[index].masks
    except BadSample as error:
        if error.reason == "no masks":
            return []
        raise


def pairwise_iou(
    name: str, first: Sequence[RLE], second: Sequence[RLE]
) -> Float[np.ndarray, "n k"]:
    """Computes the IoU of each mask in one source with each mask in the other.

    Args:
      name: The name of the image, for errors.
      first: Its n masks in one source.
      second: Its k masks in the other source.

    Raises:
      BadSample: If a mask is broken.
      ValueError: If the masks differ in size, so that the images are not the same.
    """
    try:
        return overlap.iou(first, second)
    except rle.RLEError as error:
        raise BadSample("broken mask", str(error)) from error
    except ValueError as error:
        raise ValueError(f"{name} is not the same image in both sources: {error}") from error
