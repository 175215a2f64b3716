"""Low-resolution masks at the size of their image, a tile at a time, so that none is ever whole.

Both bilinear resizes of a mask are linear and separable, and a pixel depends on few logits: a tile
of pixels is a product of three small matrices, of its rows, of a window of the logits and of its
columns. What is wanted is taken of a tile at once: counts, sides of boxes, or bits. Sizes of images
are data, not shapes, so that one program serves all whose sides have more than some 70 pixels.

A pixel lies between the logits around it. So tiles are visited only where a logit may make a pixel
of the mask, which for most masks is a small part of the image.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.images.resize import bilinear_taps, fit_size
from sam_jax.model.ops.platform import platform

TILE = 128  # pixels of a side
# Logits of a side that a tile may depend on, or all of them, as in images that are tiny. TPUs take
# parts of arrays one after the other, and are quicker with products that are larger.
WINDOW = {"cpu": 32, "gpu": 32, "tpu": None}
MAX_TILES = 128  # of a side, and the last one is never used
MAX_SIDE = TILE * (MAX_TILES - 1)  # pixels of an image's side
UNUSED = MAX_TILES - 1
BATCH = {
    "cpu": 8,
    "gpu": 64,
    "tpu": 64,
}  # tiles at a time; on CPUs what they need stays in the cache
Array = jax.Array | np.ndarray | np.int32
NEVER = np.int32(np.iinfo(np.int32).max)


@flax.struct.dataclass
class Axis:
    """The tiles of one side of an image; those from its end up to MAX_TILES (t) are unused.

    Attributes:
      step: '' int32, the pixels that a tile is responsible for, a multiple of 8 up to TILE (i).
      used: 't' int32, how many of these are in the image.
      first, last: 't' int32, the logits that these depend on; NEVER if unused.
      start: 't' int32, of the window of logits.
      index: 't i 4' int32, four logits of the window for each pixel; weight: 't i 4' float32.
      window: how many logits it has.
    """

    step: Array
    used: Array
    first: Array
    last: Array
    start: Array
    index: Array
    weight: Array
    window: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Tiling:
    """The tiles of an image."""

    rows: Axis
    columns: Axis


@flax.struct.dataclass
class Measures:
    """What is known of n masks at the size of their image.

    Attributes:
      above, area, below: 'n' int32, pixels whose logits are above the offset, 0, minus the offset.
      box: 'n 4' int32, (left, top, right, bottom), inclusive; zeros where the area is.
    """

    above: jax.Array
    area: jax.Array
    below: jax.Array
    box: jax.Array


def tile_image(size, low, frame):
    """Plans the tiles of an image.

    Args:
      size: (height, width) of the image, at most MAX_SIDE; low: of its logits; frame: of the
        model's frame, which the image fills up to `fit_size`.
    Returns:
      `Tiling` of numpy arrays.
    """
    inside, window = fit_size(size, frame), WINDOW[platform()]
    rows, columns = (_plan(*sides, window) for sides in zip(size, low, frame, inside, strict=True))
    return Tiling(rows=rows, columns=columns)


@jax.jit
def make_matrices(tiling):
    """What windows of logits are multiplied with: 't i k' of rows and of columns."""
    return tuple(_dense(axis) for axis in (tiling.rows, tiling.columns))


def measure(logits, wanted, tiling, matrices, offset):
    """Measures masks.

    Args:
      logits: 'n lh lw' float32; wanted: 'n' bool, others are not looked at and count as empty.
      tiling: of their image, and its matrices; offset: at least 0, see `Measures`.
    """
    n = len(logits)
    first, shape = _tiles_of(logits > -offset, wanted, tiling)
    ends = jnp.cumsum(shape[0] * shape[1])
    batch = BATCH[platform()]

    def visit(state):
        i, counts, low, high = state
        item = i * batch + jnp.arange(batch)
        mask = jnp.minimum(jnp.searchsorted(ends, item, side="right"), n - 1)
        nth = item - jnp.where(mask > 0, ends[mask - 1], 0)
        across = jnp.maximum(shape[1, mask], 1)
        row, column = first[0, mask] + nth // across, first[1, mask] + nth % across
        row, column = (jnp.where(item < ends[-1], x, UNUSED) for x in (row, column))
        some = measure_tiles(logits, mask, row, column, tiling, matrices, offset)
        return (
            i + 1,
            counts.at[mask].add(some[0]),
            low.at[mask].min(some[1]),
            high.at[mask].max(some[2]),
        )

    nothing = jnp.zeros((n, 3), jnp.int32), jnp.full((n, 2), NEVER), jnp.full((n, 2), -1)
    more = lambda state: state[0] * batch < ends[-1]
    _, counts, low, high = jax.lax.while_loop(more, visit, (jnp.int32(0), *nothing))
    above, below, area = counts.T
    box = jnp.where(area[:, None] > 0, jnp.concatenate([low, high], axis=1), 0)
    return Measures(above=above, area=area, below=below, box=box)


def measure_tiles(logits, mask, row, column, tiling, matrices, offset):
    """Measures some tiles 'b' of masks.

    Returns:
      'b 3' int32, the pixels above the offset, above its negative, and above 0; 'b 2' int32 each,
      the least (x, y) of the last and the greatest, NEVER and -1 if there is none.
    """
    pixels, inside = _paint(logits, mask, row, column, tiling, matrices)
    # Three counts of a row, which has few pixels, fit into one integer.
    levels = (offset, -offset, 0.0)
    flags = [(inside & (pixels > x)).astype(jnp.int32) << 8 * k for k, x in enumerate(levels)]
    flags = sum(flags)
    of_rows, of_columns = jnp.sum(flags, axis=2), jnp.max(flags, axis=1)
    counts = jnp.stack([jnp.sum(of_rows >> 8 * k & 255, axis=1) for k in range(3)], axis=1)
    x = _ends(of_columns >= 1 << 16, column * tiling.columns.step)
    y = _ends(of_rows >= 1 << 16, row * tiling.rows.step)
    low, high = (jnp.stack(sides, axis=1) for sides in zip(x, y, strict=True))
    return counts, low, high


@jax.jit
def pack(logits, mask, row, column, tiling, matrices):
    """Paints tiles as bits.

    Args:
      logits: 'n lh lw' float32; mask, row, column: 'b' int32 of each tile.
      tiling: of their image, and its matrices.
    Returns:
      'b i/8 j' uint8, lower rows in higher bits.
    """
    pixels, inside = _paint(logits, mask, row, column, tiling, matrices)
    return jnp.packbits(inside & (pixels > 0), axis=1, bitorder="little")


@functools.lru_cache(maxsize=64)
def _plan(size, low, frame, inside, window):
    """The `Axis` of a side of an image."""
    first, weight = bilinear_taps(size=inside, new_size=size)
    low_first, low_weight = bilinear_taps(size=low, new_size=frame)
    pair = np.stack([first, np.minimum(first + 1, inside - 1)], axis=1)
    index = np.stack([low_first[pair], np.minimum(low_first[pair] + 1, low - 1)], axis=-1)
    weight = np.stack([1 - weight, weight], axis=1)[:, :, None] * np.stack(
        [1 - low_weight[pair], low_weight[pair]], axis=-1
    )
    window = min(window or low, low)
    step = _step(index, window)
    if step is None:
        window, step = low, TILE

    tiles = -(-size // step)
    unused = MAX_TILES - tiles
    pixel = np.minimum(np.arange(tiles)[:, None] * step + np.arange(TILE), size - 1)
    begins, ends = index[pixel[:, 0], 0, 0], index[pixel[:, step - 1], 1, 1]
    starts = np.minimum(begins, low - window)
    pad = lambda x, value: np.concatenate([x, np.full((unused, *x.shape[1:]), value, x.dtype)])
    relative = index[pixel].reshape(tiles, TILE, 4) - starts[:, None, None]
    return Axis(
        step=np.int32(step),
        used=pad(np.minimum(step, size - np.arange(tiles) * step), 0).astype(np.int32),
        first=pad(begins, NEVER).astype(np.int32),
        last=pad(ends, NEVER).astype(np.int32),
        start=pad(starts, 0).astype(np.int32),
        index=pad(relative, 0).astype(np.int32),
        weight=pad(weight[pixel].reshape(tiles, TILE, 4), 0).astype(np.float32),
        window=window,
    )


def _step(index, window):
    """The most pixels, a multiple of 8 up to TILE, whose logits always fit in a window, or None."""
    for step in range(TILE, 0, -8):
        begins = index[::step, 0, 0]
        ends = index[np.minimum(np.arange(len(begins)) * step + step, len(index)) - 1, 1, 1]
        if (ends - begins < window).all():
            return step
    return None


def _tiles_of(some, wanted, tiling):
    """The tiles in which a mask may have pixels, given where its logits are high: 'n lh lw' bool.

    Returns:
      '2 n' int32 each, of rows and of columns: the first tile, and how many there are.
    """
    spans = []
    for axis, other in ((tiling.rows, 2), (tiling.columns, 1)):
        line = jnp.any(some, axis=other)
        low, high = jnp.argmax(line, axis=1), line.shape[1] - 1 - jnp.argmax(line[:, ::-1], axis=1)
        first = jnp.sum(axis.last < low[:, None], axis=1, dtype=jnp.int32)
        end = jnp.sum(axis.first <= high[:, None], axis=1, dtype=jnp.int32)
        spans.append((first, jnp.where(wanted & line.any(axis=1), end - first, 0)))
    firsts, counts = zip(*spans, strict=True)
    return jnp.stack(firsts), jnp.stack(counts)


def _dense(axis):
    """The weights 't i k' of a window's logits in the pixels of each tile."""
    hit = axis.index[..., None] == jnp.arange(axis.window)
    return jnp.sum(jnp.where(hit, axis.weight[..., None], 0), axis=2)


def _paint(logits, mask, row, column, tiling, matrices):
    """The pixels 'b i j' float32 of tiles, and which of them they are responsible for."""
    of_rows, of_columns = matrices
    rows, columns = tiling.rows, tiling.columns
    size = rows.window, columns.window
    if size == logits.shape[1:]:
        window = logits[mask]
    else:
        corner = jnp.stack([mask, rows.start[row], columns.start[column]], axis=1)
        window = jax.vmap(lambda at: jax.lax.dynamic_slice(logits, at, (1, *size))[0])(corner)
    highest = jax.lax.Precision.HIGHEST
    pixels = jnp.einsum("bik,bkl->bil", of_rows[row], window, precision=highest)
    pixels = jnp.einsum("bil,bjl->bij", pixels, of_columns[column], precision=highest)
    there = jnp.arange(TILE)
    inside = (there < rows.used[row, None])[:, :, None] & (there < columns.used[column, None])[
        :, None
    ]
    return pixels, inside


def _ends(line, start):
    """The first and the last position of 'b s' bool, from 'b' on; NEVER and -1 where none is."""
    first = start + jnp.argmax(line, axis=1)
    last = start + line.shape[1] - 1 - jnp.argmax(line[:, ::-1], axis=1)
    some = jnp.any(line, axis=1)
    return jnp.where(some, first, NEVER), jnp.where(some, last, -1)
