"""Images from files or from memory, read with care: people's files may be anything."""

import io
import os

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 1 << 26  # of an image, known from its header before it is decoded


class ImageError(ValueError):
    """An image that is too large, or too small, for what is asked."""


def read_image(
    source: str | os.PathLike[str] | bytes, reduce_to: tuple[int, int] | None = None
) -> np.ndarray:
    """Reads a JPEG, PNG or WebP file, upright.

    Of sixteen bits the upper eight are taken, and transparency is left out.

    Args:
      source: a path, or the bytes of a file.
      reduce_to: (height, width) of a frame. A JPEG that is at least twice as large as it needs to
        be to fill the frame is decoded at a half, a quarter or an eighth of its size: faster, and
        nearly the same once it is resized.
    Returns:
      'h w 3' uint8 RGB.
    Raises:
      OSError: if it is missing or no such image.
      ValueError: if it is larger than MAX_PIXELS.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    name = "the image" if isinstance(source, bytes) else source
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"{name} must have at most {MAX_PIXELS} pixels; got {image.width} x {image.height}"
            )
        if reduce_to is not None:
            scale = min(reduce_to[0] / image.height, reduce_to[1] / image.width)
            image.draft("RGB", (int(image.width * scale + 0.5), int(image.height * scale + 0.5)))
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # which Pillow would clip
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return np.asarray(upright.convert("RGB"))
