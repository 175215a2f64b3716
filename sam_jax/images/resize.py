"""Resizes images and points to the model's input, and masks back to the image.

The `canvas` is the padded (height, width) that the model takes; `input_size` is the size of the
resized image in its upper left corner.

Source: segment-anything `utils/transforms.py` and `modeling/sam.py` (`postprocess_masks`).

Differences: The canvas need not be square. Everything runs on the host in numpy, so that new image
sizes need no compilation. The two bilinear resizes of a mask are separable and linear, and are
computed as one matrix for the rows and one for the columns.
"""

import functools

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, Num, UInt8
from PIL import Image

# The largest number of canvas pixels per image pixel, where parts of an image are enlarged.
MAX_ZOOM = 16.0

BAND_PIXELS = 1 << 24  # of a large image that are resized at once


def fit_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Returns the size of an image after it is resized to fit the canvas.

    Args:
      size: (height, width) of the image.
      canvas: (height, width) of the model's input.

    Returns:
      (height, width); at least one of them equals that of the canvas.
    """
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def resize_and_pad(
    image: UInt8[np.ndarray, "h w 3"], canvas: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "{canvas[0]} {canvas[1]} 3"], tuple[int, int]]:
    """Resizes an image with Pillow's antialiased bilinear filter and pads it bottom and right.

    Args:
      image: RGB pixels.
      canvas: (height, width) of the result.

    Returns:
      The canvas, zero where it is padded, and the (height, width) of the image in it.
    """
    input_size = fit_size((image.shape[0], image.shape[1]), canvas)
    padded = np.zeros((*canvas, 3), np.uint8)
    padded[: input_size[0], : input_size[1]] = resize_rgb(
        image, input_size, Image.Resampling.BILINEAR
    )
    return padded, input_size


def resize_rgb(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], resample: Image.Resampling
) -> UInt8[np.ndarray, "{size[0]} {size[1]} 3"]:
    """Resizes an image exactly as Pillow does, without a second copy of a large image.

    Args:
      image: RGB pixels.
      size: (height, width) of the result.
      resample: A filter of Pillow.

    Returns:
      The resized image.
    """
    # Pillow resizes the rows first and rounds them to 8 bits, so they can be resized in bands.
    rows = max(1, BAND_PIXELS // image.shape[1])
    if rows < image.shape[0]:
        bands = [image[top : top + rows] for top in range(0, image.shape[0], rows)]
        image = np.concatenate([resize_rgb(band, (len(band), size[1]), resample) for band in bands])
    return np.asarray(Image.fromarray(image).resize(size[::-1], resample))


def resize_in_bands(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "{size[0]} {size[1]} 3"]:
    """Resizes an image that may not fit into memory, for example in a mapped file.

    It is read in bands of rows. Squares of pixels, at most half a pixel of the result wide, are
    averaged, and the averages are resized with Pillow's antialiased bilinear filter.

    Args:
      image: RGB pixels.
      size: (height, width) of the result.
    """
    height, width = image.shape[0], image.shape[1]
    factor = max(1, int(min(height / size[0], width / size[1]) / 2))
    rows = factor * max(1, BAND_PIXELS // width // factor)
    bands = [
        np.asarray(Image.fromarray(image[start : start + rows]).reduce(factor))
        for start in range(0, height, rows)
    ]
    reduced = Image.fromarray(np.concatenate(bands))
    box = (0, 0, width / factor, height / factor)  # the last squares may be cut off
    return np.asarray(reduced.resize(size[::-1], Image.Resampling.BILINEAR, box=box))


def apply_coords(
    points: Num[np.ndarray, "*batch 2"], original_size: tuple[int, int], canvas: tuple[int, int]
) -> Float[np.ndarray, "*batch 2"]:
    """Maps points from pixels of the image to pixels of the canvas.

    Args:
      points: (x, y) in pixels of the image.
      original_size: (height, width) of the image.
      canvas: (height, width) of the model's input.

    Returns:
      (x, y) in pixels of the canvas.
    """
    height, width = fit_size(original_size, canvas)
    return points * np.array([width / original_size[1], height / original_size[0]])


def postprocess_masks(
    logits: Float[np.ndarray, "*batch lh lw"],
    original_size: tuple[int, int],
    canvas: tuple[int, int],
) -> Float[np.ndarray, "*batch {original_size[0]} {original_size[1]}"]:
    """Resizes masks to the canvas, removes the padding, and resizes to the image.

    Both resizes are bilinear without antialiasing, as in the reference.

    Args:
      logits: Low-resolution masks.
      original_size: (height, width) of the image.
      canvas: (height, width) of the model's input.

    Returns:
      Logits in the size of the image.
    """
    height, width = fit_size(original_size, canvas)
    rows = _two_resizes(logits.shape[-2], canvas[0], height, original_size[0])
    columns = _two_resizes(logits.shape[-1], canvas[1], width, original_size[1])
    return rows @ logits @ columns.T


@functools.lru_cache(maxsize=64)
def _two_resizes(
    low_res: int, canvas: int, input_size: int, original_size: int
) -> Float32[np.ndarray, "{original_size} {low_res}"]:
    """Returns the matrix that resizes an axis to the canvas, crops it, and resizes it again."""
    to_canvas = _bilinear_matrix(low_res, canvas)[:input_size]
    return (_bilinear_matrix(input_size, original_size) @ to_canvas).astype(np.float32)


def _bilinear_matrix(size: int, new_size: int) -> Float64[np.ndarray, "{new_size} {size}"]:
    """Returns the matrix of a bilinear resize of one axis."""
    first, weight = bilinear_taps(size, new_size)
    matrix = np.zeros((new_size, size))
    matrix[np.arange(new_size), first] = 1 - weight
    matrix[np.arange(new_size), np.minimum(first + 1, size - 1)] += weight
    return matrix


def bilinear_taps(
    size: int, new_size: int
) -> tuple[Int64[np.ndarray, " {new_size}"], Float64[np.ndarray, " {new_size}"]]:
    """Returns the taps of a bilinear resize of one axis without antialiasing.

    Pixel centers are at +0.5. As in PyTorch, positions are computed in float32, with one rounding
    for the product and the difference.

    Args:
      size: Pixels of the axis.
      new_size: Pixels of the resized axis.

    Returns:
      For each new pixel the index of the first of its two taps, and the weight of the second. The
      second tap is the next pixel, or the same one at the end of the axis.
    """
    scale = np.float64(np.float32(size) / np.float32(new_size))
    position = np.maximum(scale * (np.arange(new_size) + 0.5) - 0.5, 0).astype(np.float32)
    first = np.minimum(position.astype(int), size - 1)
    return first, (position - first.astype(np.float32)).astype(np.float64)
