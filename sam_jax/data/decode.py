"""Reads the files of a sample and decodes images and JSON; every defect raises `BadSample`.

The files may come from anybody. Sizes are therefore limited before anything is read or allocated, a
name in a file cannot lead out of its folder, and values of a wrong type raise no other error.
"""

import io
import json
import os
from pathlib import PurePath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from sam_jax.data.example import BadSample
from sam_jax.images.read import (
    MAX_IMAGE_PIXELS,
    SIDEWAYS_ORIENTATIONS,
    DecodedImage,
    ImageError,
    decode_file,
)
from sam_jax.io import storage

REMOVE_ORIENTATION = "remove the orientation, as `exiftool -Orientation= FILE` does,"


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
        _check_bytes(path, storage.stat(path)[0], kind)
        return storage.read_range(path, 0, kind.max_bytes)
    except FileNotFoundError as error:
        raise BadSample("missing file", f"there is no file {path}") from error
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
    path, windows_path = PurePath(name), PureWindowsPath(name)  # both read / as a separator
    if path.is_absolute() or windows_path.drive or ".." in windows_path.parts:
        raise BadSample("broken json", f"a file name must stay in its folder; got {describe(name)}")
    return os.path.join(folder, name)


def parse_json(data: bytes, name: str) -> Any:
    """Parses JSON.

    NaN and Infinity, which are no JSON but are often written, become floats. They are an error only
    in a field that is read, as every other value that is not a number of the right type.

    Args:
      data: The bytes of a JSON file.
      name: The name of the file, for error messages.

    Returns:
      The value.

    Raises:
      BadSample: If the data is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise BadSample("broken json", f"{name} is nested too deeply") from None
    except ValueError as error:
        raise BadSample("broken json", f"{name}: {error}") from error


def decode_image(
    data: bytes, mask_size: tuple[int, int] | None, decode_size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image.

    Args:
      data: The bytes of a JPEG, PNG or WebP file.
      mask_size: (height, width) of the masks of the image, which must be that of the upright image.
        None if there are no masks.
      decode_size: See `read_image`. A JPEG may be decoded smaller than `mask_size`.

    Returns:
      RGB pixels.

    Raises:
      BadSample: If the image is broken, too large, of another size, or turned in a way that leaves
        open how its masks are turned.
    """
    try:
        image = decode_file(io.BytesIO(data), "the image", decode_size)
    except (OSError, ImageError) as error:
        raise BadSample("broken image", str(error)) from error
    if mask_size is not None:
        _check_mask_size(image, mask_size)
    return image.pixels


def check_size(height: Any, width: Any) -> tuple[int, int]:
    """Checks the size of an image that was read from a file.

    Args:
      height: A value of any type.
      width: A value of any type.

    Returns:
      (height, width).

    Raises:
      BadSample: If they are not two positive whole numbers, or too large.
    """
    for side in (height, width):
        is_number = type(side) in (int, float) and 0 < side <= MAX_IMAGE_PIXELS
        if not is_number or side != int(side):
            raise BadSample(
                "broken json", f"height and width must be whole numbers; got {describe(side)}"
            )
    height, width = int(height), int(width)  # some programs write 480.0
    if height * width > MAX_IMAGE_PIXELS:
        raise BadSample(
            "broken image", f"at most {MAX_IMAGE_PIXELS} pixels; got {format_size((height, width))}"
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


def format_size(size: tuple[int, int]) -> str:
    """Formats (height, width) for a message."""
    return f"{size[0]} x {size[1]}"


def _check_mask_size(image: DecodedImage, mask_size: tuple[int, int]) -> None:
    """Checks that masks are those of the upright image.

    Some programs draw masks on the upright image, others on the pixels in the file. The two agree
    in size if the image is mirrored, upside down or square.
    """
    turned = f"it is turned by its EXIF orientation {image.orientation}"
    is_sideways = image.orientation in SIDEWAYS_ORIENTATIONS
    if image.size != mask_size:
        detail = f"the image is {format_size(image.size)}, its masks are {format_size(mask_size)}"
        if is_sideways and image.size == mask_size[::-1]:
            detail += f"; {turned}, and its masks are not: {REMOVE_ORIENTATION}"
        raise BadSample("size mismatch", detail)
    if image.orientation != 1 and (not is_sideways or mask_size[0] == mask_size[1]):
        raise BadSample(
            "turned image",
            f"{turned}, and the sizes cannot tell if its masks are, too: {REMOVE_ORIENTATION} if "
            "the masks are of the pixels in the file, or turn these, as `mogrify -auto-orient` "
            "does, if the masks are of the upright image",
        )


def _check_bytes(path: str, size: int, kind: FileKind) -> None:
    if size > kind.max_bytes:
        raise BadSample(kind.reason, f"{path}: at most {kind.max_bytes} bytes; got {size}")
