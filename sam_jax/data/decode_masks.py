"""Decodes PNGs of masks and checks run lengths; every defect is a `BadSample`.

Files and values may come from anybody; see `sam_jax.data.decode`.
"""

import collections
import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from PIL import Image, UnidentifiedImageError

from sam_jax.data.decode import format_size
from sam_jax.data.example import RLE, BadSample
from sam_jax.images.read import check_pixels, convert_in_strips, decoding_budget
from sam_jax.masks import rle

SINGLE_CHANNEL_MODES = ("1", "L", "I;16")  # of Pillow


def decode_labels(data: bytes, name: str) -> Shaped[np.ndarray, "h w"]:
    """Decodes a PNG label map.

    Args:
      data: The bytes of the file.
      name: The name of the file, for error messages.

    Returns:
      One bool, uint8 or uint16 number a pixel.

    Raises:
      BadSample: If the file is broken, too large, or in color.
    """

    def convert(image: Image.Image) -> Shaped[np.ndarray, "h w"]:
        if image.mode not in (*SINGLE_CHANNEL_MODES, "P"):
            raise ValueError(f"one number a pixel is expected; got {image.mode}")
        return np.asarray(image)

    return _decode_png(data, name, convert)


def decode_mask(data: bytes, name: str) -> Bool[np.ndarray, "h w"]:
    """Decodes a PNG mask, whose pixels are True where they are not black.

    Transparent pixels are False. If all other pixels are black, the mask is in the alpha channel,
    and these are True.

    Args:
      data: The bytes of the file, in color or not.
      name: The name of the file, for error messages.

    Returns:
      The mask.

    Raises:
      BadSample: If the file is broken or too large.
    """
    colored = _decode_png(data, name, _is_colored)
    if colored.ndim == 2:
        return colored
    colored, opaque = colored[..., 0], colored[..., 1]
    mask = colored & opaque
    return mask if mask.any() or opaque.all() else opaque


class Masks(NamedTuple):
    """The masks of an image.

    Attributes:
      usable: Checked run lengths, which all have the same size.
      skipped: Why the others cannot be used.
    """

    usable: list[RLE]
    skipped: list[BadSample]


def check_masks(
    masks: Iterable[Any],
    size: tuple[int, int] | None,
    to_rle: Callable[[Any], Any] = lambda mask: mask,
) -> Masks:
    """Checks masks without decoding them. Unusable ones are skipped.

    Args:
      masks: Values that should be masks.
      size: (height, width) that the masks must have. None takes the most frequent size.
      to_rle: Converts a value to run lengths. It may raise BadSample.

    Returns:
      The masks, of which at least one is usable. Run lengths have no other keys than size and
      counts.

    Raises:
      BadSample: If no mask can be used, with the reason of the first one, or if there are none.
    """
    checked: list[RLE | BadSample] = []
    for i, mask in enumerate(masks):
        try:
            checked.append(_check_mask(to_rle(mask), size))
        except BadSample as error:
            checked.append(BadSample(error.reason, f"mask {i}: {error.detail}"))
    if size is None:
        checked = _keep_most_frequent_size(checked)
    skipped = [mask for mask in checked if isinstance(mask, BadSample)]
    usable = [mask for mask in checked if not isinstance(mask, BadSample)]
    if not usable:
        raise skipped[0] if skipped else BadSample("no masks", "the image has no masks")
    return Masks(usable, skipped)


def _decode_png(
    data: bytes, name: str, convert: Callable[[Image.Image], Shaped[np.ndarray, "h w *c"]]
) -> Shaped[np.ndarray, "h w *c"]:
    """Decodes a PNG of masks strip by strip; see `convert_in_strips`."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            check_pixels(image, "it")
            with decoding_budget.acquire(image.width * image.height):
                return convert_in_strips(image, convert)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise BadSample("broken mask", f"{name} is not a PNG") from error
    except Exception as error:  # decoders raise errors of any type
        message = str(error) or type(error).__name__
        raise BadSample("broken mask", f"{name}: {message}") from error


def _is_colored(image: Image.Image) -> Bool[np.ndarray, "h w *c"]:
    """Returns for each pixel if it is not black; with transparency also if it is opaque."""
    if image.mode in SINGLE_CHANNEL_MODES:
        return np.asarray(image).astype(bool)
    has_alpha = image.has_transparency_data
    pixels: UInt8[np.ndarray, "h w c"] = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    is_colored: Bool[np.ndarray, "h w"] = np.any(pixels[..., :3], axis=-1)
    return np.stack([is_colored, pixels[..., 3] > 0], axis=-1) if has_alpha else is_colored


def _check_mask(mask: Any, size: tuple[int, int] | None) -> RLE:
    try:
        area = rle.area(mask)
    except rle.RLEError as error:
        raise BadSample("broken mask", str(error)) from error
    found = int(mask["size"][0]), int(mask["size"][1])
    if size is not None and found != size:
        raise BadSample(
            "size mismatch", f"it is {format_size(found)}, the image is {format_size(size)}"
        )
    if not area:
        raise BadSample("empty mask", f"it has no pixels of {format_size(found)}")
    return {"size": list(found), "counts": mask["counts"]}


def _keep_most_frequent_size(masks: list[RLE | BadSample]) -> list[RLE | BadSample]:
    """Replaces masks of other sizes by the reason."""
    sizes = [None if isinstance(mask, BadSample) else tuple(mask["size"]) for mask in masks]
    counts = collections.Counter(size for size in sizes if size is not None)
    if len(counts) < 2:
        return masks
    frequent = counts.most_common(1)[0][0]
    return [
        BadSample(
            "size mismatch",
            f"mask {i}: it is {format_size(size)}, most are {format_size(frequent)}",
        )
        if size not in (None, frequent)
        else mask
        for i, (mask, size) in enumerate(zip(masks, sizes, strict=True))
    ]
