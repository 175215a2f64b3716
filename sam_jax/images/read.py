"""Reads images from files or from memory, which may hold anything."""

import io
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_PIXELS = 1 << 26  # checked in the header, before an image is decoded


class ImageError(ValueError):
    """An image that is too large or too small for the task."""


def read_image(
    source: str | os.PathLike[str] | bytes, decode_size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Reads a JPEG, PNG or WebP file as an upright RGB image.

    Images of 16 bits keep their upper 8 bits. Transparency is ignored.

    Args:
      source: A path, or the bytes of a file.
      decode_size: (height, width) that the image will be resized to fit into. A JPEG that is at
        least twice as large is decoded at 1/2, 1/4 or 1/8 of its size, never below the size that
        fits. This is faster, and nearly the same after the resize. None decodes in full.

    Returns:
      The image.

    Raises:
      OSError: If the file is missing or not such an image.
      ValueError: If it has more than MAX_IMAGE_PIXELS pixels.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    name = "the image" if isinstance(source, bytes) else source
    with Image.open(file, formats=IMAGE_FORMATS) as image:
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError(
                f"{name} must have at most {MAX_IMAGE_PIXELS} pixels; "
                f"got {image.width} x {image.height}"
            )
        if decode_size is not None:
            scale = min(decode_size[0] / image.height, decode_size[1] / image.width)
            image.draft("RGB", (int(image.width * scale + 0.5), int(image.height * scale + 0.5)))
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # Pillow would clip 16 bits instead of scaling them
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return np.asarray(upright.convert("RGB"))
