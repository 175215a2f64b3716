"""The files of a sample, read with care: whatever is wrong with one is a `BadSample`.

Sources hand over what strangers made. So sizes are capped before anything is read or allocated, a
name in a file cannot lead out of its folder, and no value of a wrong type raises another error.
"""

import io
import json
import os
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sam_jax.data.example import RLE, BadSample
from sam_jax.images.read import FORMATS, MAX_PIXELS, read_image
from sam_jax.io import storage
from sam_jax.masks import rle

GRAY = ("1", "L", "I;16")  # Pillow's modes of one number a pixel


class Kind(NamedTuple):
    """A kind of file: the reason to count a broken one by, and the most bytes of any."""

    reason: str
    max_bytes: int


IMAGE = Kind("broken image", 1 << 28)
MASK = Kind("broken mask", 1 << 28)
JSON = Kind("broken json", 1 << 24)  # SA-1B's are below 1 MB


def read_file(path: str, kind: Kind) -> bytes:
    """Reads a whole file.

    Raises:
      BadSample: if it is missing, no regular file or too large.
    """
    try:
        if not storage.is_file(path):  # a pipe would be waited for
            raise BadSample("missing file", f"there is no file {path}")
        _check_bytes(path, storage.stat(path)[0], kind)
        return storage.read_range(path)
    except OSError as error:
        raise BadSample("missing file", f"{path} cannot be read: {error}") from error


def read_range(path: str, offset: int, size: int, kind: Kind) -> bytes:
    """Reads `size` bytes of a file from an offset.

    Raises:
      BadSample: if the file is missing or ends before, or if the part is too large.
    """
    _check_bytes(path, size, kind)
    try:
        data = storage.read_range(path, offset, size)
    except OSError as error:
        raise BadSample("missing file", f"{path} cannot be read: {error}") from error
    if len(data) < size:
        raise BadSample(kind.reason, f"{path} is cut short: it ends {size - len(data)} bytes early")
    return data


def path_in(folder: str, name: Any) -> str:
    """The path of a file that a file of the folder names.

    Raises:
      BadSample: if the name is no string, or leads out of the folder.
    """
    if not isinstance(name, str) or not name:
        raise BadSample("broken json", f"a file name must be a string; got {short(name)}")
    path = PurePath(name)
    if path.is_absolute() or path.drive or ".." in path.parts:
        raise BadSample("broken json", f"a file name must stay in its folder; got {short(name)}")
    return os.path.join(folder, name)


def parse_json(data: bytes) -> Any:
    """Parses JSON.

    Raises:
      BadSample: if it is none, has NaN or infinite constants, or is nested too deeply.
    """
    try:
        return json.loads(data, parse_constant=_refuse)
    except RecursionError:
        raise BadSample("broken json", "it is nested too deeply") from None
    except ValueError as error:
        raise BadSample("broken json", str(error)) from error


def decode_image(
    data: bytes, size: tuple[int, int] | None, reduce_to: tuple[int, int] | None = None
) -> np.ndarray:
    """Decodes an image.

    Args:
      data: a JPEG, PNG or WebP file.
      size: (height, width) that it must have, upright; any if None.
      reduce_to: see `read_image`; a JPEG may then be decoded smaller than `size`.
    Returns:
      'h w 3' uint8 RGB.
    Raises:
      BadSample: if it is broken, too large or of another size.
    """
    try:
        image = read_image(data, reduce_to)
        found = image.shape[:2]
        if size is not None and reduce_to is not None and found != size:
            found = _size_in_header(data)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they stumble over
        raise BadSample("broken image", _message(error)) from error
    if size is not None and found != size:
        raise BadSample("size mismatch", f"the image is {_by(found)}, its masks are {_by(size)}")
    return image


def decode_labels(data: bytes) -> np.ndarray:
    """Decodes a PNG of one number a pixel -> 'h w' bool, uint8 or uint16.

    Raises:
      BadSample: if it is broken, too large or has colors.
    """
    return _decode_png(data, (*GRAY, "P"))


def decode_mask(data: bytes) -> np.ndarray:
    """Decodes a PNG, in color or not, of what is not black -> 'h w' bool.

    Raises:
      BadSample: if it is broken or too large.
    """
    pixels = _decode_png(data) != 0
    return pixels if pixels.ndim == 2 else pixels.any(axis=-1)


def check_masks(masks: Iterable[Any], size: tuple[int, int]) -> list[RLE]:
    """Checks run lengths without painting them.

    Args:
      masks: what should be run lengths.
      size: (height, width) that they must have.
    Returns:
      The same, with nothing beside size and counts.
    Raises:
      BadSample: if one is broken, empty or of another size, or if there are none.
    """
    checked = []
    for i, mask in enumerate(masks):
        try:
            area = rle.area(mask)
        except rle.RLEError as error:
            raise BadSample("broken mask", f"mask {i}: {error}") from error
        if tuple(mask["size"]) != size:
            found = _by(mask["size"])
            raise BadSample("size mismatch", f"mask {i} is {found}, the image is {_by(size)}")
        if not area:
            raise BadSample("empty mask", f"mask {i} of {_by(size)} has no pixels")
        checked.append({"size": list(size), "counts": mask["counts"]})
    if not checked:
        raise BadSample("no masks", "the image has no masks")
    return checked


def check_size(height: Any, width: Any) -> tuple[int, int]:
    """Checks an image's size in a file -> (height, width).

    Raises:
      BadSample: if they are not two positive ints, or too large.
    """
    for side in (height, width):
        if type(side) is not int or not 0 < side <= MAX_PIXELS:
            raise BadSample("broken json", f"height and width must be ints; got {short(side)}")
    if height * width > MAX_PIXELS:
        raise BadSample("broken image", f"at most {MAX_PIXELS} pixels; got {_by((height, width))}")
    return height, width


def short(value: Any) -> str:
    """A value in a message."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, str | int | float | None):
        text = ascii(value) if type(value) is not int or abs(value) < 10**20 else "a huge int"
        return text if len(text) <= 80 else f"{text[:76]}..."
    return f"a {type(value).__name__}"


def _decode_png(data, modes=None):
    """Pixels as they are in one of these modes; in any mode if None, then 'h w 3' if in color."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                size = _by((image.height, image.width))
                raise BadSample("broken mask", f"at most {MAX_PIXELS} pixels; got {size}")
            if modes is None:
                return np.asarray(image if image.mode in GRAY else image.convert("RGB"))
            if image.mode not in modes:
                raise BadSample("broken mask", f"one number a pixel is expected; got {image.mode}")
            return np.asarray(image)
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever they stumble over
        raise BadSample("broken mask", _message(error)) from error


def _size_in_header(data):
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        lies = image.getexif().get(0x0112) in (5, 6, 7, 8)  # orientations that lie on a side
        return (image.width, image.height) if lies else (image.height, image.width)


def _check_bytes(path, size, kind):
    if size > kind.max_bytes:
        raise BadSample(kind.reason, f"{path}: at most {kind.max_bytes} bytes; got {size}")


def _refuse(constant):
    raise ValueError(f"{constant} is not a number")


def _message(error):
    return str(error) or type(error).__name__


def _by(size):
    return f"{size[0]} x {size[1]}"
