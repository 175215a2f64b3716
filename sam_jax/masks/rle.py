"""Encodes masks as COCO run lengths (RLE) and decodes them, in vectorized numpy.

A mask is read column by column as runs of equal pixels, zeros first. From the fourth run on, each
length is stored as its difference from the length two runs before. A number is split into groups of
five bits, lowest first; the top bit of its last group is the sign. A group is stored as the
character of code 48 + bits, plus 32 if another group follows.

Source: `common/maskApi.c` in cocodataset/cocoapi (rleEncode, rleToString, rleFrString). `encode`
gives the same bytes.

Differences:
- Run lengths that do not describe exactly one mask of the given size are an error. The C code reads
  past the end of a truncated string and writes past the end of a mask.
- A mask has at most MAX_PIXELS pixels.
- Functions take one mask, and `counts` is a str, so that an RLE can be written as JSON.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8

MAX_PIXELS = 2**26  # the limit for images, too; a decoded mask takes at most 64 MiB
MAX_GROUPS = 6  # 30 bits; differences of runs need 28, and sums cannot overflow int64


class RLEError(ValueError):
    """Run lengths that do not describe a mask."""


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Encodes a mask as a compressed COCO RLE.

    Args:
      mask: 'h w' bool of at most MAX_PIXELS pixels. Contiguous rows or columns are fastest.

    Returns:
      {"size": [h, w], "counts": str}.

    Raises:
      ValueError: If the mask has another shape or dtype, or too many pixels.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(
            f"mask must be 'h w' bool, got {mask.dtype} of shape {mask.shape}; "
            "pass one mask per call, for example encode(logits[0] > 0)"
        )
    if mask.size > MAX_PIXELS:
        raise ValueError(f"mask of shape {mask.shape}: at most {MAX_PIXELS} pixels are allowed")
    bounds = np.concatenate([[0], _changes(mask), [mask.size]])
    return {"size": list(mask.shape), "counts": _pack(np.diff(bounds))}


def encode_bits(
    bits: UInt8[np.ndarray, "w h_8"], corner: tuple[int, int], size: tuple[int, int]
) -> dict[str, Any]:
    """Encodes a mask from the bits of a part of it. All pixels outside of the part are False.

    Args:
      bits: The part column by column, eight rows per byte, with the topmost row in the lowest bit.
        Bits outside of the mask must be zero.
      corner: (x, y) of the part's top left pixel in the mask.
      size: (height, width) of the mask.

    Returns:
      {"size": [h, w], "counts": list of run lengths}, see `compress`.
    """
    height, width = size
    before = bits << 1
    before[:, 1:] |= bits[:, :-1] >> 7
    changed = np.concatenate([bits ^ before, bits[:, -1:] >> 7], axis=1)
    byte = np.flatnonzero(changed)
    i, bit = np.nonzero(np.unpackbits(changed.ravel()[byte, None], axis=1, bitorder="little"))
    column, row = np.divmod(byte[i], changed.shape[1])
    position = (corner[0] + column) * height + corner[1] + 8 * row + bit
    # A run that continues at the top of the next column ends and begins at the same position.
    joined = np.flatnonzero(position[1:] == position[:-1])
    position = np.delete(position, np.concatenate([joined, joined + 1]))
    position = position[position < height * width]
    lengths = np.diff(position, prepend=0, append=height * width)
    return {"size": [height, width], "counts": lengths.tolist()}


def uncompress(rle: Any) -> dict[str, Any]:
    """Converts an RLE to a list of run lengths.

    Args:
      rle: See `decode`.

    Returns:
      {"size": [h, w], "counts": list of run lengths}.

    Raises:
      RLEError: See `decode`.
    """
    lengths = runs(rle)  # validates the size, too
    return {"size": list(map(int, rle["size"])), "counts": lengths.tolist()}


def compress(rle: Any) -> dict[str, Any]:
    """Converts an RLE to a string.

    Args:
      rle: See `decode`.

    Returns:
      {"size": [h, w], "counts": str}.

    Raises:
      RLEError: See `decode`.
    """
    lengths = runs(rle)  # validates the size, too
    return {"size": list(map(int, rle["size"])), "counts": _pack(lengths)}


def decode(rle: Any) -> Bool[np.ndarray, "h w"]:
    """Decodes an RLE.

    Args:
      rle: {"size": [h, w], "counts": compressed str or bytes, or a list of run lengths}. It may be
        read from a file: values of other types are errors.

    Returns:
      The mask, contiguous by columns (`np.ascontiguousarray` makes it contiguous by rows).

    Raises:
      RLEError: If the runs are not a mask of that size. No pixel is allocated before the check.
    """
    lengths = runs(rle)
    height, width = rle["size"]
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def decode_resized(
    rle: Any, new_size: tuple[int, int]
) -> Bool[np.ndarray, "{new_size[0]} {new_size[1]}"]:
    """Decodes an RLE at another size by nearest neighbor.

    Equal to `decode` followed by a nearest-neighbor resize, but no pixels are decoded at the
    original size. The bounds of the runs are mapped to the new size instead.

    Args:
      rle: See `decode`.
      new_size: (height, width) of the result, both at least 1.

    Returns:
      The mask, contiguous by columns.

    Raises:
      RLEError: See `decode`.
    """
    return decode_runs_resized(runs(rle), rle["size"], new_size)


def decode_runs_resized(
    lengths: Int64[np.ndarray, " r"],
    size: Sequence[int],
    new_size: tuple[int, int],
    window: tuple[int, int, int, int] | None = None,
) -> Bool[np.ndarray, "h w"]:
    """Decodes run lengths, or a window of them, at another size. See `decode_resized`.

    Args:
      lengths: Checked run lengths, as returned by `runs`.
      size: (height, width) of the mask.
      new_size: (height, width) of the resized mask, both at least 1.
      window: (top, left, height, width) of the part of the resized mask to decode, both sides at
        least 1. None decodes the entire mask.

    Returns:
      The mask, contiguous by columns.
    """
    height, width = int(size[0]), int(size[1])
    top, left, window_height, window_width = window or (0, 0, *new_size)
    sampled_index, next_sampled, is_sampled = _sampled_columns(
        width, new_size[1], left, window_width
    )
    column, row = np.divmod(np.cumsum(lengths[:-1]), height)
    new_row = _next_sampled_rows(height, new_size[0], top, window_height)[row]
    bounds = next_sampled[column] * window_height + is_sampled[column] * new_row
    num_sampled = sampled_index[-1] + 1
    new_lengths = np.diff(bounds, prepend=0, append=num_sampled * window_height)
    inside = np.arange(len(new_lengths)) % 2 == 1
    columns = np.repeat(inside, new_lengths).reshape(num_sampled, window_height)
    return (columns if num_sampled == window_width else columns[sampled_index]).T


def area(rle: Any) -> int:
    """Counts the pixels of an RLE without decoding it.

    Args:
      rle: See `decode`.

    Returns:
      The number of pixels.

    Raises:
      RLEError: See `decode`.
    """
    return int(runs(rle)[1::2].sum())


def runs(rle: Any) -> Int64[np.ndarray, " r"]:
    """Reads and checks the run lengths of an RLE without decoding it.

    Args:
      rle: See `decode`.

    Returns:
      Lengths >= 0 whose sum is h * w. Runs at odd indices are inside the mask. The cumulative sum
      gives the bounds of the runs as positions `column * h + row`.

    Raises:
      RLEError: If the runs are not a mask of that size. Memory stays proportional to the input.
    """
    if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
        raise RLEError(f"an RLE is a dict with 'size' and 'counts', got {_got(rle)}")
    height, width = _check_size(rle["size"])
    pixels, counts = height * width, rle["counts"]
    if isinstance(counts, str | bytes):
        lengths = _unpack(counts, pixels)
    elif isinstance(counts, list | tuple):
        lengths = _check_list(counts, pixels)
    else:
        raise RLEError(f"counts must be a str, bytes or a list of ints, got {_got(counts)}")

    # Runs longer than the mask are rejected before the sum, so that the sum cannot overflow.
    wrong = np.flatnonzero((lengths < 0) | (lengths > pixels))
    if wrong.size:
        length = lengths[wrong[0]]
        raise RLEError(f"run {wrong[0]} must be 0 to {pixels} pixels long, got {length}")
    total = int(lengths.sum())
    if total != pixels:
        raise RLEError(f"runs must sum to {height} * {width} = {pixels}, got {total}")
    return lengths


def bounds(rle: Any) -> Int64[np.ndarray, "r 2"]:
    """Returns the start and the end of each run inside a mask, without decoding it.

    Args:
      rle: See `decode`.

    Returns:
      Ascending positions `column * h + row` of each run's first pixel and of the first pixel after
      it. No run is empty.

    Raises:
      RLEError: See `runs`.
    """
    lengths = runs(rle)
    ends, inside = np.cumsum(lengths)[1::2], lengths[1::2]
    return np.stack([ends - inside, ends], axis=-1)[inside > 0]


def _nearest(size: int, new_size: int) -> Int64[np.ndarray, " {new_size}"]:
    """Returns for each new pixel of an axis the index of the pixel that contains its center."""
    return (2 * np.arange(new_size) + 1) * size // (2 * new_size)


@functools.lru_cache(maxsize=64)  # the masks of an image have the same size
def _next_sampled_rows(
    height: int, new_height: int, top: int, count: int
) -> Int64[np.ndarray, " {height}"]:
    """Returns for each row of a mask the first new row that samples it or a later row.

    The `count` new rows begin at `top`, with the number 0. Rows after the last one get `count`.
    """
    return np.searchsorted(_nearest(height, new_height)[top : top + count], np.arange(height))


@functools.lru_cache(maxsize=64)
def _sampled_columns(
    width: int, new_width: int, left: int, count: int
) -> tuple[
    Int64[np.ndarray, " {count}"],
    Int64[np.ndarray, " {width}+1"],
    Bool[np.ndarray, " {width}+1"],
]:
    """Finds the source columns that a nearest-neighbor resize samples.

    Returns:
      For each of the `count` new columns from `left` on, the index of its source among the sampled
      columns. For each source column from 0 to `width`, the index of the first sampled column at or
      after it, and True if the column itself is sampled.
    """
    columns = _nearest(width, new_width)[left : left + count]
    sampled = columns[np.diff(columns, prepend=-1) > 0]
    is_sampled = np.zeros(width + 1, bool)
    is_sampled[sampled] = True
    next_sampled = np.searchsorted(sampled, np.arange(width + 1))
    return np.searchsorted(sampled, columns), next_sampled, is_sampled


def _changes(mask: Bool[np.ndarray, "h w"]) -> Int64[np.ndarray, " r"]:
    """Returns ascending positions `column * h + row` of pixels that differ from the one before.

    The pixel before the first counts as False. Finding changes in the memory order of the mask and
    sorting them is faster than transposing the mask, because there are few of them.
    """
    changed = np.empty_like(mask)
    changed[1:] = mask[1:] != mask[:-1]
    changed[:1, 1:] = mask[:1, 1:] != mask[-1:, :-1]
    changed[:1, :1] = mask[:1, :1]
    if changed.flags.f_contiguous:
        return np.flatnonzero(changed.T)
    height, width = mask.shape
    row, column = np.divmod(np.flatnonzero(changed), width)
    return np.sort(column * height + row)


def _pack(lengths: Int64[np.ndarray, " r"]) -> str:
    """Encodes run lengths as a string."""
    values = lengths.copy()
    values[3:] -= lengths[1:-2]
    magnitude = values ^ (values >> 63)  # v, or -1 - v where v is negative
    limits = 2 ** np.arange(4, 5 * (MAX_GROUPS - 1), 5)  # k groups hold less than 2**(5 * k - 1)
    groups = 1 + np.searchsorted(limits, magnitude, side="right")[:, None]
    group = np.arange(groups.max())
    codes = (values[:, None] >> 5 * group & 31) + 32 * (group < groups - 1) + 48
    return str(codes[group < groups].astype(np.uint8).tobytes(), "ascii")


def _unpack(counts: str | bytes, pixels: int) -> Int64[np.ndarray, " r"]:
    """Decodes a string to run lengths. The lengths and their sum are not checked."""
    data = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    codes = np.frombuffer(data, np.uint8) - np.uint8(48)  # wraps: bytes below 48 end up above 63
    is_invalid = codes > 63
    if is_invalid.any():
        index = int(is_invalid.argmax())
        raise RLEError(f"counts[{index}] must be a character from 48 to 111, got {data[index]}")
    is_last = codes < 32
    if len(is_last) and not is_last[-1]:
        raise RLEError(f"counts is cut short: {chr(data[-1])!r} at its end says that more follows")
    _check_number(int(np.count_nonzero(is_last)), pixels)
    ends = np.flatnonzero(is_last)
    groups = np.diff(ends, prepend=-1)
    if (groups > MAX_GROUPS).any():
        raise RLEError(f"a run must have at most {MAX_GROUPS} characters, got {groups.max()}")

    starts = ends - groups + 1
    group = np.arange(len(codes)) - np.repeat(starts, groups)
    values = np.add.reduceat((codes & 31).astype(np.int64) << 5 * group, starts)
    values -= np.where(codes[ends] & 16, 1 << 5 * groups, 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _check_list(counts: Sequence[Any], pixels: int) -> Int64[np.ndarray, " r"]:
    _check_number(len(counts), pixels)
    for index, count in enumerate(counts):
        if not _is_int(count, pixels):
            raise RLEError(f"counts[{index}] must be an int from 0 to {pixels}, got {_got(count)}")
    return np.array(counts, np.int64)


def _check_size(size: Any) -> tuple[int, int]:
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise RLEError(f"size must be two ints [h, w], got {_got(size)}")
    for side in size:
        if not _is_int(side, MAX_PIXELS):
            raise RLEError(f"size must hold ints from 0 to {MAX_PIXELS}, got {_got(side)}")
    height, width = int(size[0]), int(size[1])  # as numpy ints their product could overflow
    if height * width > MAX_PIXELS:
        raise RLEError(f"size {height} * {width}: at most {MAX_PIXELS} pixels are allowed")
    return height, width


def _check_number(number: int, pixels: int) -> None:
    if number > pixels + 1:
        raise RLEError(f"{pixels} pixels have at most {pixels + 1} runs, got {number}")


def _is_int(value: Any, limit: int) -> bool:
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return integer and bool(0 <= value <= limit)  # a numpy bool otherwise


def _got(value: Any) -> str:
    """Formats a value for a message. `repr` would raise for ints of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    if isinstance(value, int | float | np.number):
        return repr(value)
    if isinstance(value, list | tuple | Mapping):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
