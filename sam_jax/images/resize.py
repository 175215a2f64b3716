"""Images, points and boxes into the model's frame, and masks back out of it.

Source: segment-anything `utils/transforms.py`, `modeling/sam.py` (`postprocess_masks`).

Differences: frames need not be square; everything here runs on the host in numpy, so that no image
size means a compilation; the two bilinear resizes of a mask, separable and linear, are one matrix
for its rows and one for its columns.
"""

import functools

import numpy as np
from PIL import Image


def fit_size(size, frame):
    """(height, width) of an image of `size` when its longest side fills the `frame`."""
    scale = min(frame[0] / size[0], frame[1] / size[1])
    return tuple(max(1, int(side * scale + 0.5)) for side in size)


def resize_and_pad(image, frame):
    """Resizes 'h w 3' uint8 by Pillow's antialiased bilinear filter, pads bottom and right.

    Returns:
      'fh fw 3' uint8, and the (height, width) in it that is not padding.
    """
    size = fit_size(image.shape[:2], frame)
    resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    padded = np.zeros((*frame, 3), np.uint8)
    padded[: size[0], : size[1]] = resized
    return padded, size


def apply_coords(points, original_size, frame):
    """Moves '... 2' points (x, y) from pixels of the image to pixels of the frame."""
    height, width = fit_size(original_size, frame)
    return points * np.array([width / original_size[1], height / original_size[0]])


def postprocess_masks(logits, original_size, frame):
    """Resizes '... lh lw' logits to the frame, crops its padding, resizes to '... h w'.

    Both resizes are bilinear without antialias, as the reference's.
    """
    height, width = fit_size(original_size, frame)
    rows = _two_resizes(logits.shape[-2], frame[0], height, original_size[0])
    columns = _two_resizes(logits.shape[-1], frame[1], width, original_size[1])
    return rows @ logits @ columns.T


@functools.lru_cache(maxsize=64)
def _two_resizes(low, frame, inside, original):
    """The float32 matrix 'original low' of: resize to `frame`, keep `inside`, resize."""
    to_frame = _bilinear(low, frame)[:inside]
    return (_bilinear(inside, original) @ to_frame).astype(np.float32)


def _bilinear(size, new_size):
    """The matrix 'new_size size' of a bilinear resize of one axis."""
    first, weight = bilinear_taps(size, new_size)
    matrix = np.zeros((new_size, size))
    matrix[np.arange(new_size), first] = 1 - weight
    matrix[np.arange(new_size), np.minimum(first + 1, size - 1)] += weight
    return matrix


def bilinear_taps(size, new_size):
    """Where a bilinear resize of one axis without antialias looks, pixel centres at +0.5.

    As PyTorch's: in float32, the position by a product and a difference that are rounded once.

    Returns:
      'new_size' int, the first pixel of the two that each new one lies between, and 'new_size'
      float64, the weight of the second, which is the first again at the end of the axis.
    """
    scale = np.float64(np.float32(size) / np.float32(new_size))
    position = np.maximum(scale * (np.arange(new_size) + 0.5) - 0.5, 0).astype(np.float32)
    first = np.minimum(position.astype(int), size - 1)
    return first, (position - first.astype(np.float32)).astype(np.float64)
