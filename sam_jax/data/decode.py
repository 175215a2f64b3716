"""Reads and decodes the files of a sample; every defect raises `BadSample`.

The files may come from anybody. Sizes are therefore limited before anything is read or allocated, a
name in a file cannot lead out of its folder, and values of a wrong type raise no other error.
"""

import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from PIL import Image

from sam_jax.data.example import RLE, BadSample
from sam_jax.images.read import IMAGE_FORMATS, MAX_IMAGE_PIXELS, read_image
from sam_jax.io import storage
from sam_jax.masks import rle

SINGLE_CHANNEL_MODES = ("1", "L", "I;16")  # of Pillow
ORIENTATION = 0x0112  # the EXIF tag
SIDEWAYS_ORIENTATIONS = (5, 6, 7, 8)  # height and width are swapped when the image is upright


class FileKind(NamedTuple):
    """A kind of file.

    Attributes:
      reason: The reason of `BadSample` for a broken file.
      max_bytes: The largest size that is read.
    """

    reason: str
    max_bytes: int


IMAGE_FILE = FileKind("broken image", 1 << 28)
MASK_FILE = FileKind("broken mask", 1 << 28)
JSON_FILE = FileKind("broken json", 1 << 24)  # those of SA-1B are below 1 MB


def read_file(path: str, kind: FileKind) -> bytes:
    """Reads a file.

    Args:
      path: A path or a URL.
      kind: The kind of the file.

    Returns:
      The bytes of the file.

    Raises:
      BadSample: If the file is missing, not a regular file, or too large.
    """
    try:
        if not storage.is_file(path):  # reading a pipe would wait forever
            raise BadSample("missing file", f"there is no file {path}")
        _check_bytes(path, storage.stat(path)[0], kind)
        return storage.read_range(path)
    except OSError as error:
        raise BadSample("missing file", f"{path} cannot be read: {error}") from error


def read_range(path: str, offset: int, size: int, kind: FileKind) -> bytes:
    """Reads a range of a file.

    Args:
      path: A path or a URL.
      offset: The first byte.
      size: The number of bytes.
      kind: The kind of the file that the range holds.

    Returns:
      The bytes.

    Raises:
      BadSample: If the file is missing, ends earlier, or the range is too large.
    """
    _check_bytes(path, size, kind)
    try:
        data = storage.read_range(path, offset, size)
    except OSError as error:
        raise BadSample("missing file", f"{path} cannot be read: {error}") from error
    if len(data) < size:
        raise BadSample(kind.reason, f"{path} is cut short: it ends {size - len(data)} bytes early")
    return data


def safe_join(folder: str, name: Any) -> str:
    """Joins a folder and a file name that was read from a file.

    Args:
      folder: The folder.
      name: The name, of any type.

    Returns:
      The path of the file.

    Raises:
      BadSample: If the name is not a string or leads out of the folder.
    """
    if not isinstance(name, str) or not name:
        raise BadSample("broken json", f"a file name must be a string; got {describe(name)}")
    path = PurePath(name)
    if path.is_absolute() or path.drive or ".." in path.parts:
        raise BadSample("broken json", f"a file name must stay in its folder; got {describe(name)}")
    return os.path.join(folder, name)


def parse_json(data: bytes) -> Any:
    """Parses JSON.

    Args:
      data: The bytes of a JSON file.

    Returns:
      The value.

    Raises:
      BadSample: If the data is not JSON, has NaN or infinite constants, or is nested too deeply.
    """
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise BadSample("broken json", "it is nested too deeply") from None
    except ValueError as error:
        raise BadSample("broken json", str(error)) from error


def decode_image(
    data: bytes, size: tuple[int, int] | None, decode_size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image.

    Args:
      data: The bytes of a JPEG, PNG or WebP file.
      size: (height, width) that the upright image must have. None allows any.
      decode_size: See `read_image`. A JPEG may be decoded smaller than `size`.

    Returns:
      RGB pixels.

    Raises:
      BadSample: If the image is broken, too large, or of another size.
    """
    try:
        image = read_image(data, decode_size)
        found = image.shape[:2]
        if size is not None and decode_size is not None and found != size:
            found = _size_in_header(data)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise errors of any type
        raise BadSample("broken image", _message(error)) from error
    if size is not None and found != size:
        raise BadSample("size mismatch", f"the image is {_by(found)}, its masks are {_by(size)}")
    return image


def decode_labels(data: bytes) -> Shaped[np.ndarray, "h w"]:
    """Decodes a PNG label map.

    Args:
      data: The bytes of the file.

    Returns:
      One bool, uint8 or uint16 number a pixel.

    Raises:
      BadSample: If the file is broken, too large, or in color.
    """
    return _decode_png(data, (*SINGLE_CHANNEL_MODES, "P"))


def decode_mask(data: bytes) -> Bool[np.ndarray, "h w"]:
    """Decodes a PNG mask, whose pixels are True where they are not black.

    Args:
      data: The bytes of the file, in color or not.

    Returns:
      The mask.

    Raises:
      BadSample: If the file is broken or too large.
    """
    pixels = _decode_png(data) != 0
    return pixels if pixels.ndim == 2 else pixels.any(axis=-1)


def check_masks(masks: Iterable[Any], size: tuple[int, int]) -> list[RLE]:
    """Checks run lengths without decoding them.

    Args:
      masks: Values that should be run lengths.
      size: (height, width) that the masks must have.

    Returns:
      The run lengths, with no other keys than size and counts.

    Raises:
      BadSample: If a mask is broken, empty or of another size, or if there are none.
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
    """Checks the size of an image that was read from a file.

    Args:
      height: A value of any type.
      width: A value of any type.

    Returns:
      (height, width).

    Raises:
      BadSample: If they are not two positive ints, or too large.
    """
    for side in (height, width):
        if type(side) is not int or not 0 < side <= MAX_IMAGE_PIXELS:
            raise BadSample("broken json", f"height and width must be ints; got {describe(side)}")
    if height * width > MAX_IMAGE_PIXELS:
        raise BadSample(
            "broken image", f"at most {MAX_IMAGE_PIXELS} pixels; got {_by((height, width))}"
        )
    return height, width


def describe(value: Any) -> str:
    """Formats a value of any type for a message, in at most 80 characters."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, str | int | float | None):
        text = ascii(value) if type(value) is not int or abs(value) < 10**20 else "a huge int"
        return text if len(text) <= 80 else f"{text[:76]}..."
    return f"a {type(value).__name__}"


def _decode_png(data: bytes, modes: Sequence[str] | None = None) -> Shaped[np.ndarray, "h w *c"]:
    """Decodes a PNG in one of these modes. None allows any, and gives 'h w 3' for color."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                size = _by((image.height, image.width))
                raise BadSample("broken mask", f"at most {MAX_IMAGE_PIXELS} pixels; got {size}")
            if modes is None:
                is_gray = image.mode in SINGLE_CHANNEL_MODES
                return np.asarray(image if is_gray else image.convert("RGB"))
            if image.mode not in modes:
                raise BadSample("broken mask", f"one number a pixel is expected; got {image.mode}")
            return np.asarray(image)
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of any type
        raise BadSample("broken mask", _message(error)) from error


def _size_in_header(data: bytes) -> tuple[int, int]:
    """Returns the (height, width) of the upright image."""
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        is_sideways = image.getexif().get(ORIENTATION) in SIDEWAYS_ORIENTATIONS
        return (image.width, image.height) if is_sideways else (image.height, image.width)


def _check_bytes(path: str, size: int, kind: FileKind) -> None:
    if size > kind.max_bytes:
        raise BadSample(kind.reason, f"{path}: at most {kind.max_bytes} bytes; got {size}")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _message(error: Exception) -> str:
    return str(error) or type(error).__name__


def _by(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"
