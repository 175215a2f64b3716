"""COCO run lengths: a mask as a short string, in vectorised numpy.

A mask is read column by column as runs of equal pixels, zeros first. From the fourth run on, the
difference to the run two before is stored. A number is cut into groups of five bits, lowest first;
the top bit of its last group is the sign. A group is one character: 48 + bits, and + 32 where
another group follows.

Source: `common/maskApi.c` in cocodataset/cocoapi (rleEncode, rleToString, rleFrString); `encode`
gives the same bytes. Deliberate differences:
- The readers refuse whatever is not exactly one mask of its size, where the C code reads past the
  end of a cut string and paints past the end of a mask.
- A mask has at most MAX_PIXELS pixels.
- One mask a call, and `counts` is a str, so that an RLE can go into JSON as it is.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MAX_PIXELS = 2**26  # no larger image is opened (64 MP), and painting takes at most 64 MiB
_MAX_GROUPS = 6  # 30 bits: a difference of runs needs 28, and nothing in here can overflow


class RLEError(ValueError):
    """Run lengths that do not describe a mask."""


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Writes a mask as a compressed COCO RLE.

    Args:
      mask: 'h w' bool of at most MAX_PIXELS pixels; fastest where rows or columns are contiguous.
    Returns:
      {"size": [h, w], "counts": str}.
    Raises:
      ValueError: if the mask has another shape or dtype, or too many pixels.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(
            f"mask must be 'h w' bool, got {mask.dtype} of shape {mask.shape}; "
            "one mask a call, for example encode(logits[0] > 0)"
        )
    if mask.size > MAX_PIXELS:
        raise ValueError(f"mask of shape {mask.shape}: at most {MAX_PIXELS} pixels are allowed")
    bounds = np.concatenate([[0], _changes(mask), [mask.size]])
    return {"size": list(mask.shape), "counts": _pack(np.diff(bounds))}


def encode_bits(bits: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    """`encode` of a mask of which a part is given as bits, all outside of it being False.

    Args:
      bits: 'w h/8' uint8, the part column by column, lower rows in higher bits.
      corner: (x, y) of the part in the mask; size: (height, width) of the mask. What of the part
        lies outside of the mask must be False.
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
    # A run that goes on from the bottom of a column to the top of the next was ended in between.
    ended = np.flatnonzero(position[1:] == position[:-1])
    position = np.delete(position, np.concatenate([ended, ended + 1]))
    position = position[position < height * width]
    lengths = np.diff(position, prepend=0, append=height * width)
    return {"size": [height, width], "counts": lengths.tolist()}


def uncompress(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Writes run lengths as a list of int; argument and errors as for `decode`."""
    return {"size": list(map(int, rle["size"])), "counts": runs(rle).tolist()}


def compress(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Writes run lengths as a string; argument and errors as for `decode`."""
    return {"size": list(map(int, rle["size"])), "counts": _pack(runs(rle))}


def decode(rle: Mapping[str, Any]) -> np.ndarray:
    """Paints an RLE.

    Args:
      rle: {"size": [h, w], "counts": compressed str or bytes, or a list of run lengths}.
    Returns:
      'h w' bool, contiguous by columns (`np.ascontiguousarray` makes it contiguous by rows).
    Raises:
      RLEError: before any pixel is allocated, if the runs are not a mask of that size.
    """
    lengths = runs(rle)
    height, width = rle["size"]
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def decode_resized(rle: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """Paints an RLE at another size, each pixel as the nearest one of the mask.

    Equal to `decode` and a resize by nearest neighbour, but nothing is painted at the mask's own
    size: the bounds of its runs are moved to the new size instead.

    Args:
      rle: as for `decode`; shape: (height, width) of the result, both at least 1.
    Returns:
      'h w' bool, contiguous by columns.
    Raises:
      RLEError: as `decode`.
    """
    return paint_resized(runs(rle), rle["size"], shape)


def paint_resized(lengths: np.ndarray, size: Sequence[int], shape: tuple[int, int]) -> np.ndarray:
    """`decode_resized` from what `runs` gives for a mask of (height, width) `size`."""
    height, width = int(size[0]), int(size[1])
    source, first, is_seen = _columns(width, shape[1])
    column, row = np.divmod(np.cumsum(lengths[:-1]), height)
    bounds = first[column] * shape[0] + is_seen[column] * _rows(height, shape[0])[row]
    seen = source[-1] + 1
    lengths = np.diff(bounds, prepend=0, append=seen * shape[0])
    inside = np.arange(len(lengths)) % 2 == 1
    painted = np.repeat(inside, lengths).reshape(seen, shape[0])
    return (painted if seen == shape[1] else painted[source]).T


def area(rle: Mapping[str, Any]) -> int:
    """Counts the pixels of an RLE without painting it; argument and errors as for `decode`."""
    return int(runs(rle)[1::2].sum())


def runs(rle: Mapping[str, Any]) -> np.ndarray:
    """Reads and checks the run lengths of an RLE without painting it.

    Args:
      rle: as for `decode`.
    Returns:
      int64 lengths >= 0 with the sum h * w; those at odd indices lie inside the mask. Their
      cumulative sum gives the bounds of the runs as positions `column * h + row`.
    Raises:
      RLEError: if the runs are not a mask of that size; memory stays proportional to the input.
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

    # No run may be longer than the mask before they are summed, so the sum cannot overflow.
    wrong = np.flatnonzero((lengths < 0) | (lengths > pixels))
    if wrong.size:
        length = lengths[wrong[0]]
        raise RLEError(f"run {wrong[0]} must be 0 to {pixels} pixels long, got {length}")
    total = int(lengths.sum())
    if total != pixels:
        raise RLEError(f"runs must sum to {height} * {width} = {pixels}, got {total}")
    return lengths


def bounds(rle: Mapping[str, Any]) -> np.ndarray:
    """Where the runs inside a mask begin and end, without painting it.

    Args:
      rle: as for `decode`.
    Returns:
      'r 2' int64, ascending positions `column * h + row` of each run's first pixel and of the first
      one after it; no run is empty.
    Raises:
      RLEError: as `runs`.
    """
    lengths = runs(rle)
    ends, inside = np.cumsum(lengths)[1::2], lengths[1::2]
    return np.stack([ends - inside, ends], axis=-1)[inside > 0]


def _nearest(size: int, new_size: int) -> np.ndarray:
    """The pixels of an axis that those of a new size are nearest to, by their centres."""
    return (2 * np.arange(new_size) + 1) * size // (2 * new_size)


@functools.lru_cache(maxsize=64)  # the masks of an image are alike
def _rows(height: int, new_height: int) -> np.ndarray:
    """The first row of the new size that lies at or below each row of a mask."""
    return np.searchsorted(_nearest(height, new_height), np.arange(height))


@functools.lru_cache(maxsize=64)
def _columns(width: int, new_width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which columns of a mask are seen at a new size: those that are nearest to any there.

    Returns:
      For each new column, which of the seen ones it is; for each position from 0 to `width`, the
      first seen one from there on, counted among the seen ones; whether it is seen itself.
    """
    columns = _nearest(width, new_width)
    seen = columns[np.diff(columns, prepend=-1) > 0]
    is_seen = np.zeros(width + 1, bool)
    is_seen[seen] = True
    return np.searchsorted(seen, columns), np.searchsorted(seen, np.arange(width + 1)), is_seen


def _changes(mask: np.ndarray) -> np.ndarray:
    """Positions `column * h + row`, ascending, of the pixels that differ from the one before.

    The pixel before the first counts as False. To look for changes in the mask's own memory order
    and to sort the few there are takes less time than to transpose the mask.
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


def _pack(lengths: np.ndarray) -> str:
    """Run lengths as a string."""
    values = lengths.copy()
    values[3:] -= lengths[1:-2]
    magnitude = values ^ (values >> 63)  # v, or -1 - v where v is negative
    limits = 2 ** np.arange(4, 5 * (_MAX_GROUPS - 1), 5)  # k groups hold less than 2**(5 * k - 1)
    groups = 1 + np.searchsorted(limits, magnitude, side="right")[:, None]
    place = np.arange(groups.max())
    codes = (values[:, None] >> 5 * place & 31) + 32 * (place < groups - 1) + 48
    return str(codes[place < groups].astype(np.uint8).tobytes(), "ascii")


def _unpack(counts: str | bytes, pixels: int) -> np.ndarray:
    """A string as run lengths; each and their sum are yet to be checked."""
    data = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    codes = np.frombuffer(data, np.uint8) - np.uint8(48)  # wraps: bytes below 48 end up above 63
    foreign = codes > 63
    if foreign.any():
        index = int(foreign.argmax())
        raise RLEError(f"counts[{index}] must be a character from 48 to 111, got {data[index]}")
    final = codes < 32
    if len(final) and not final[-1]:
        raise RLEError(f"counts is cut short: {chr(data[-1])!r} at its end says that more follows")
    _check_number(int(np.count_nonzero(final)), pixels)
    ends = np.flatnonzero(final)
    groups = np.diff(ends, prepend=-1)
    if (groups > _MAX_GROUPS).any():
        raise RLEError(f"a run must have at most {_MAX_GROUPS} characters, got {groups.max()}")

    starts = ends - groups + 1
    place = np.arange(len(codes)) - np.repeat(starts, groups)
    values = np.add.reduceat((codes & 31).astype(np.int64) << 5 * place, starts)
    values -= np.where(codes[ends] & 16, 1 << 5 * groups, 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _check_list(counts: Sequence[Any], pixels: int) -> np.ndarray:
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
    return integer and 0 <= value <= limit


def _got(value: Any) -> str:
    """A value in a message, short and safe: `repr` raises for ints of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    if isinstance(value, int | float | np.number):
        return repr(value)
    if isinstance(value, list | tuple | Mapping):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
