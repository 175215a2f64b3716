"""Reads images from files or from memory, which may hold anything."""

import io
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from sam_jax.images.budget import PixelBudget
from sam_jax.images.resize import fit_size
from sam_jax.io import storage

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_PIXELS = 1 << 26  # checked in the header, before an image is decoded
WEBP_COST = 2  # the memory of the WebP decoder, relative to that of the others
STRIP_PIXELS = 1 << 22  # that are converted at once

# Many images of an ordinary size are decoded at the same time, but only one of the largest size.
decoding_budget = PixelBudget(MAX_IMAGE_PIXELS)

ORIENTATION_TAG = 0x0112  # of EXIF
SIDEWAYS_ORIENTATIONS = (5, 6, 7, 8)  # height and width are swapped when the image is upright


class ImageError(ValueError):
    """An image that is too large or too small for the task."""


class DecodedImage(NamedTuple):
    """The content of an image file.

    Attributes:
      pixels: The upright RGB image, which may be decoded smaller than it is.
      size: (height, width) of the upright image at its full size.
      orientation: Its EXIF orientation, from 1, which is upright, to 8.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    size: tuple[int, int]
    orientation: int


def read_image(
    source: str | os.PathLike[str] | bytes, decode_size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Reads a JPEG, PNG or WebP file as an upright RGB image.

    Images of 16 bits keep their upper 8 bits. Transparency is ignored. Threads that decode large
    images wait for each other, so that the memory of all of them together is bounded.

    Args:
      source: A path, or the bytes of a file.
      decode_size: (height, width) that the image will be resized to fit into. A JPEG that is at
        least twice as large is decoded at 1/2, 1/4 or 1/8 of its size, never below the size that
        fits. This is faster, and nearly the same after the resize. None decodes in full.

    Returns:
      The image.

    Raises:
      OSError: If the file is missing, not a regular file, not such an image, or damaged.
      ImageError: If it has more than MAX_IMAGE_PIXELS (67 million) pixels. Larger images must be
        made smaller or cut into parts.
    """
    if isinstance(source, bytes):
        return decode_file(io.BytesIO(source), "the image", decode_size).pixels
    with storage.open_file(source) as file:
        return decode_file(file, os.fspath(source), decode_size).pixels


def decode_file(
    file: io.BytesIO | io.BufferedReader, name: str, decode_size: tuple[int, int] | None = None
) -> DecodedImage:
    """Decodes a JPEG, PNG or WebP file. See `read_image`.

    Args:
      file: The file.
      name: Its name, for error messages.
      decode_size: See `read_image`.

    Returns:
      The image.

    Raises:
      OSError: If the file is not such an image, or damaged.
      ImageError: If it has too many pixels.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            check_pixels(image, name)
            return _decode(image, decode_size)
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} must have at most {MAX_IMAGE_PIXELS} pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise OSError(f"{name} is not a JPEG, PNG or WebP file") from error
    except Exception as error:  # decoders raise errors of any type
        raise OSError(f"{name} is damaged: {str(error) or type(error).__name__}") from error


def check_pixels(image: Image.Image, name: str) -> None:
    """Raises ImageError if an image has more than MAX_IMAGE_PIXELS pixels in its header."""
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ImageError(
            f"{name} must have at most {MAX_IMAGE_PIXELS} pixels; got {image.width} x "
            f"{image.height}; make it smaller or cut it into parts"
        )


def convert_in_strips(
    image: Image.Image, convert: Callable[[Image.Image], Shaped[np.ndarray, "h w *c"]]
) -> Shaped[np.ndarray, "h w *c"]:
    """Converts an image to an array strip by strip, without a second copy of the image.

    Args:
      image: The image.
      convert: Converts a strip, pixel by pixel.

    Returns:
      The array.
    """
    rows = max(1, STRIP_PIXELS // image.width)
    if rows >= image.height:
        return convert(image)
    first = convert(image.crop((0, 0, image.width, rows)))
    pixels = np.empty((image.height, *first.shape[1:]), first.dtype)
    pixels[:rows] = first
    for top in range(rows, image.height, rows):
        bottom = min(top + rows, image.height)
        pixels[top:bottom] = convert(image.crop((0, top, image.width, bottom)))
    return pixels


def _decode(image: Image.Image, decode_size: tuple[int, int] | None) -> DecodedImage:
    size = image.height, image.width
    if decode_size is not None:
        # Without an effect unless the image is a JPEG, whose size is then smaller.
        image.draft("RGB", fit_size(size, decode_size)[::-1])
    # The decoder of a progressive JPEG has all of its coefficients in memory.
    is_reduced = "progressive" not in image.info
    pixels = image.width * image.height if is_reduced else size[0] * size[1]
    with decoding_budget.acquire(pixels * (WEBP_COST if image.format == "WEBP" else 1)):
        image.load()  # the EXIF data of a PNG may follow its pixels
        tag = image.getexif().get(ORIENTATION_TAG)
        ImageOps.exif_transpose(image, in_place=True)
        image.info.pop("transparency", None)  # ignored, and Pillow may warn of it
        orientation = next((known for known in range(1, 9) if tag == known), 1)
        if orientation in SIDEWAYS_ORIENTATIONS:
            size = size[1], size[0]
        return DecodedImage(convert_in_strips(image, _to_rgb), size, orientation)


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode.startswith("I"):  # Pillow would clip 16 bits instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
