"""Masks resized in tiles equal masks resized in full, for images of all sizes."""

import functools

import jax
import numpy as np
import pytest

from sam_jax.everything.tiled_resize import make_matrices, measure_masks, pack_tiles
from sam_jax.everything.tiling import MAX_SIDE, MAX_TILES, TILE_SIZE, UNUSED_TILE, plan_tiles
from sam_jax.images.resize import postprocess_masks
from sam_jax.masks.boxes import box_of_mask

CANVAS, LOW_RES = (96, 128), (48, 64)  # patches of 8 pixels
LARGE_CANVAS, LARGE_LOW_RES = (1024, 1024), (256, 256)
WINDOW = 32
SIZES = [(96, 128), (300, 400), (517, 300), (130, 700), (31, 20), (1, 1), (3, 200), (500, 1)]
OFFSET = np.float32(0.5)

measure = jax.jit(functools.partial(measure_masks, batch_size=8))


@pytest.fixture(scope="module")
def logits():
    """Returns logits of blobs, of an empty mask, of a mask that fills the canvas, and of noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: LOW_RES[0], : LOW_RES[1]]
    blobs = [3 - np.hypot(y - a, x - b) / r for a, b, r in rng.uniform(0.3, 48, (4, 3))]
    blobs += [np.full(LOW_RES, -3.0), np.full(LOW_RES, 3.0), rng.normal(0, 2, LOW_RES)]
    return np.array(blobs, np.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_measures_equal_those_of_full_size_masks(logits, size):
    valid = np.arange(len(logits)) != 2
    tiling = plan_tiles(size, LOW_RES, CANVAS, WINDOW)
    measures = measure(logits, valid, tiling, make_matrices(tiling), OFFSET)
    full = postprocess_masks(logits, size, CANVAS)
    full[~valid] = -9

    def count(level):
        return np.sum(full > level, axis=(1, 2))

    np.testing.assert_array_equal(measures.above, count(OFFSET))
    np.testing.assert_array_equal(measures.area, count(0))
    np.testing.assert_array_equal(measures.below, count(-OFFSET))
    np.testing.assert_array_equal(measures.box, box_of_mask(full > 0))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_equal_those_of_full_size_masks(logits, size):
    tiling = plan_tiles(size, LOW_RES, CANVAS, WINDOW)
    down, across = (int(np.sum(axis.num_pixels > 0)) for axis in (tiling.rows, tiling.columns))
    items = [(m, i, j) for m in range(len(logits)) for i in range(down) for j in range(across)]
    items += [(0, UNUSED_TILE, UNUSED_TILE)] * (-len(items) % 64)
    batches, matrices = np.array(items).reshape(-1, 64, 3), make_matrices(tiling)
    tiles = np.concatenate([pack_tiles(logits, *batch.T, tiling, matrices) for batch in batches])
    tiles = np.unpackbits(tiles, axis=1, bitorder="little")
    assert tiles.shape[1:] == (TILE_SIZE, TILE_SIZE)
    step = int(tiling.rows.step), int(tiling.columns.step)
    pixels = np.zeros((len(logits), down * step[0], across * step[1]), bool)
    for (m, i, j), tile in zip(items, tiles, strict=True):
        if i == UNUSED_TILE:
            assert not tile.any()
            continue
        assert not tile[step[0] :].any()
        assert not tile[:, step[1] :].any()
        pixels[m, i * step[0] :, j * step[1] :][: step[0], : step[1]] = tile[: step[0], : step[1]]
    full = postprocess_masks(logits, size, CANVAS) > 0
    np.testing.assert_array_equal(pixels[:, : size[0], : size[1]], full)
    assert pixels.sum() == full.sum()


@pytest.mark.parametrize(
    "size", [(1, 1), (20, 70), (100, 71), (1100, 900), (1500, 2250), (5, MAX_SIDE)]
)
def test_the_window_of_a_tile_contains_the_logits_of_its_pixels(size):
    tiling = plan_tiles(size, LARGE_LOW_RES, LARGE_CANVAS, WINDOW)
    for axis, side in zip((tiling.rows, tiling.columns), size, strict=True):
        assert axis.step % 8 == 0
        assert 0 < axis.step <= TILE_SIZE
        assert axis.num_pixels.sum() == side
        assert axis.num_pixels[UNUSED_TILE] == 0
        assert len(axis.num_pixels) == MAX_TILES
        assert (axis.start >= 0).all()
        assert (axis.start + axis.window <= 256).all()
        for tile in np.flatnonzero(axis.num_pixels):
            index = axis.index[tile, : axis.num_pixels[tile]]
            assert index.min() >= 0
            assert index.max() < axis.window
            np.testing.assert_allclose(
                axis.weight[tile, : axis.num_pixels[tile]].sum(axis=1), 1, 1e-6
            )


def test_one_program_serves_images_of_all_sizes(logits):
    shapes = {
        jax.tree.map(np.shape, plan_tiles(size, LARGE_LOW_RES, LARGE_CANVAS, WINDOW))
        for size in [(90, 120), (600, 800), (1500, 2250), (MAX_SIDE, 3000)]
    }
    assert len({str(shape) for shape in shapes}) == 1
