"""Resizes low-resolution masks to the size of their image, one batch of tiles at a time.

No mask is ever held at the full size. A tile is reduced immediately to what is needed of it:
counts of pixels, the sides of a box, or bits. A pixel's logit is a weighted mean of the logits
around it, so only tiles are visited in which a logit is high enough. For most masks these are a
small part of the image.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt8

from sam_jax.everything.tiling import INT32_MAX, TILE_SIZE, UNUSED_TILE, Axis, Tiling

Matrices = tuple[Float32[Array, "t i k"], Float32[Array, "t j l"]]


@flax.struct.dataclass
class Measures:
    """Measures of q masks at the size of their image.

    Attributes:
      above: The number of pixels whose logits are above the offset.
      area: The number of pixels whose logits are above 0.
      below: The number of pixels whose logits are above minus the offset.
      box: (left, top, right, bottom), inclusive; zeros for empty masks.
    """

    above: Int32[Array, " q"]
    area: Int32[Array, " q"]
    below: Int32[Array, " q"]
    box: Int32[Array, "q 4"]


@jax.jit
def make_matrices(tiling: Tiling) -> Matrices:
    """Returns the matrices that resize a window of logits to each tile, of rows and of columns.

    Args:
      tiling: The tiles.
    """
    return _make_matrix(tiling.rows), _make_matrix(tiling.columns)


def measure_masks(
    logits: Float32[Array, "q lh lw"],
    valid: Bool[Array, " q"],
    tiling: Tiling,
    matrices: Matrices,
    offset: float | np.float32 | Float[Array, ""],
    *,
    batch_size: int,
) -> Measures:
    """Measures masks.

    Args:
      logits: Low-resolution logits.
      valid: The masks to measure. Others are skipped and count as empty.
      tiling: The tiles of the image.
      matrices: The matrices of the tiling.
      offset: The distance of two levels from 0, at least 0. See `Measures`.
      batch_size: The number of tiles that are measured at a time.
    """
    q = len(logits)
    first, num_tiles = _find_tiles(logits > -offset, valid, tiling)
    ends = jnp.cumsum(num_tiles[0] * num_tiles[1])  # of each mask in one list of all tiles

    def has_more(state: tuple[Array, Array, Array, Array]) -> Bool[Array, ""]:
        return state[0] * batch_size < ends[-1]

    def measure_next(
        state: tuple[Array, Array, Array, Array],
    ) -> tuple[Array, Array, Array, Array]:
        i, counts, top_left, bottom_right = state
        index = i * batch_size + jnp.arange(batch_size)
        mask = jnp.minimum(jnp.searchsorted(ends, index, side="right"), q - 1)
        index_in_mask = index - jnp.where(mask > 0, ends[mask - 1], 0)
        num_columns = jnp.maximum(num_tiles[1, mask], 1)
        row = first[0, mask] + index_in_mask // num_columns
        column = first[1, mask] + index_in_mask % num_columns
        row, column = (jnp.where(index < ends[-1], x, UNUSED_TILE) for x in (row, column))
        tile_counts, tile_top_left, tile_bottom_right = measure_tiles(
            logits, mask, row, column, tiling, matrices, offset
        )
        return (
            i + 1,
            counts.at[mask].add(tile_counts),
            top_left.at[mask].min(tile_top_left),
            bottom_right.at[mask].max(tile_bottom_right),
        )

    counts = jnp.zeros((q, 3), jnp.int32)
    top_left, bottom_right = jnp.full((q, 2), INT32_MAX), jnp.full((q, 2), -1)
    _, counts, top_left, bottom_right = jax.lax.while_loop(
        has_more, measure_next, (jnp.int32(0), counts, top_left, bottom_right)
    )
    above, below, area = counts.T
    box = jnp.concatenate([top_left, bottom_right], axis=1)
    return Measures(above=above, area=area, below=below, box=jnp.where(area[:, None] > 0, box, 0))


def measure_tiles(
    logits: Float32[Array, "q lh lw"],
    mask: Int[Array, " b"],
    row: Int[Array, " b"],
    column: Int[Array, " b"],
    tiling: Tiling,
    matrices: Matrices,
    offset: float | np.float32 | Float[Array, ""],
) -> tuple[Int32[Array, "b 3"], Int32[Array, "b 2"], Int32[Array, "b 2"]]:
    """Measures b tiles.

    Args:
      logits: Low-resolution logits of all masks.
      mask: The index of each tile's mask.
      row: The row of each tile.
      column: The column of each tile.
      tiling: The tiles of the image.
      matrices: The matrices of the tiling.
      offset: See `measure_masks`.

    Returns:
      The numbers of pixels above the offset, above minus the offset, and above 0; the smallest
      (x, y) of the pixels above 0, INT32_MAX if there are none; and their largest (x, y), or -1.
    """
    pixels, is_inside = _resize_to_tiles(logits, mask, row, column, tiling, matrices)
    # The three counts of a row of TILE_SIZE pixels fit into one integer of three bytes.
    flags = sum(
        (is_inside & (pixels > level)).astype(jnp.int32) << 8 * byte
        for byte, level in enumerate((offset, -offset, 0.0))
    )
    row_counts, column_flags = jnp.sum(flags, axis=2), jnp.max(flags, axis=1)
    counts = jnp.stack([jnp.sum(row_counts >> 8 * k & 255, axis=1) for k in range(3)], axis=1)
    left, right = _first_and_last(column_flags >= 1 << 16, column * tiling.columns.step)
    top, bottom = _first_and_last(row_counts >= 1 << 16, row * tiling.rows.step)
    return counts, jnp.stack([left, top], axis=1), jnp.stack([right, bottom], axis=1)


@jax.jit
def pack_tiles(
    logits: Float32[Array, "q lh lw"],
    mask: Int[Array, " b"],
    row: Int[Array, " b"],
    column: Int[Array, " b"],
    tiling: Tiling,
    matrices: Matrices,
) -> UInt8[Array, "b _ j"]:
    """Returns the pixels of b tiles as bits, eight rows per byte, lower rows in higher bits.

    Args:
      logits: Low-resolution logits of all masks.
      mask: The index of each tile's mask.
      row: The row of each tile.
      column: The column of each tile.
      tiling: The tiles of the image.
      matrices: The matrices of the tiling.
    """
    pixels, is_inside = _resize_to_tiles(logits, mask, row, column, tiling, matrices)
    return jnp.packbits(is_inside & (pixels > 0), axis=1, bitorder="little")


def _make_matrix(axis: Axis) -> Float32[Array, "t i k"]:
    """Returns the weights of a window's k logits for the pixels of each tile."""
    is_tap = axis.index[..., None] == jnp.arange(axis.window)
    return jnp.sum(jnp.where(is_tap, axis.weight[..., None], 0), axis=2)


def _find_tiles(
    is_high: Bool[Array, "q lh lw"], valid: Bool[Array, " q"], tiling: Tiling
) -> tuple[Int32[Array, "2 q"], Int32[Array, "2 q"]]:
    """Finds the tiles in which masks may have pixels.

    Args:
      is_high: The logits that may make pixels of the mask.
      valid: Masks to look at; others have no tiles.
      tiling: The tiles of the image.

    Returns:
      The (row, column) of each mask's first tile, and its numbers of tile rows and columns.
    """
    firsts, counts = [], []
    for axis, other in ((tiling.rows, 2), (tiling.columns, 1)):
        line = jnp.any(is_high, axis=other)
        low = jnp.argmax(line, axis=1)
        high = line.shape[1] - 1 - jnp.argmax(line[:, ::-1], axis=1)
        first = jnp.sum(axis.last < low[:, None], axis=1, dtype=jnp.int32)
        end = jnp.sum(axis.first <= high[:, None], axis=1, dtype=jnp.int32)
        firsts.append(first)
        counts.append(jnp.where(valid & line.any(axis=1), end - first, 0))
    return jnp.stack(firsts), jnp.stack(counts)


def _resize_to_tiles(
    logits: Float32[Array, "q lh lw"],
    mask: Int[Array, " b"],
    row: Int[Array, " b"],
    column: Int[Array, " b"],
    tiling: Tiling,
    matrices: Matrices,
) -> tuple[Float32[Array, "b i j"], Bool[Array, "b i j"]]:
    """Returns the upsampled pixels of tiles, and True for those that the tile covers.

    Neighboring tiles overlap where a tile covers fewer than TILE_SIZE pixels.
    """
    row_matrix, column_matrix = matrices
    rows, columns = tiling.rows, tiling.columns
    size = rows.window, columns.window
    if size == logits.shape[1:]:
        window = logits[mask]
    else:
        corners = jnp.stack([mask, rows.start[row], columns.start[column]], axis=1)

        def cut_window(corner: Int[Array, " 3"]) -> Float32[Array, "k l"]:
            return jax.lax.dynamic_slice(logits, corner, (1, *size))[0]

        window = jax.vmap(cut_window)(corners)
    highest = jax.lax.Precision.HIGHEST
    pixels = jnp.einsum("bik,bkl->bil", row_matrix[row], window, precision=highest)
    pixels = jnp.einsum("bil,bjl->bij", pixels, column_matrix[column], precision=highest)
    position = jnp.arange(TILE_SIZE)
    is_row_inside = position < rows.num_pixels[row, None]
    is_column_inside = position < columns.num_pixels[column, None]
    return pixels, is_row_inside[:, :, None] & is_column_inside[:, None]


def _first_and_last(
    line: Bool[Array, "b i"], start: Int[Array, " b"]
) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
    """Returns the first and last true positions plus `start`, or INT32_MAX and -1 without any."""
    first = start + jnp.argmax(line, axis=1)
    last = start + line.shape[1] - 1 - jnp.argmax(line[:, ::-1], axis=1)
    is_any = jnp.any(line, axis=1)
    return jnp.where(is_any, first, INT32_MAX), jnp.where(is_any, last, -1)
