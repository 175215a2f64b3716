"""Masks by tiles equal masks that are painted whole, whatever the sizes."""

import jax
import numpy as np
import pytest

from sam_jax.everything.tiled_resize import (
    MAX_SIDE,
    MAX_TILES,
    TILE,
    UNUSED,
    make_matrices,
    measure,
    pack,
    tile_image,
)
from sam_jax.images.resize import postprocess_masks
from sam_jax.masks.boxes import box_of_mask

FRAME, LOW = (96, 128), (48, 64)  # patches of 8 pixels
LARGE_FRAME, LARGE_LOW = (1024, 1024), (256, 256)
SIZES = [(96, 128), (300, 400), (517, 300), (130, 700), (31, 20), (1, 1), (3, 200), (500, 1)]
OFFSET = np.float32(0.5)

measure_jit = jax.jit(measure)


@pytest.fixture(scope="module")
def logits():
    """Blobs of all sizes, an empty one, one that fills the frame, and noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: LOW[0], : LOW[1]]
    blobs = [3 - np.hypot(y - a, x - b) / r for a, b, r in rng.uniform(0.3, 48, (4, 3))]
    blobs += [np.full(LOW, -3.0), np.full(LOW, 3.0), rng.normal(0, 2, LOW)]
    return np.array(blobs, np.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_measures_are_those_of_whole_masks(logits, size):
    wanted = np.arange(len(logits)) != 2
    tiling = tile_image(size, LOW, FRAME)
    measures = measure_jit(logits, wanted, tiling, make_matrices(tiling), OFFSET)
    whole = postprocess_masks(logits, size, FRAME)
    whole[~wanted] = -9
    count = lambda level: np.sum(whole > level, axis=(1, 2))
    np.testing.assert_array_equal(measures.above, count(OFFSET))
    np.testing.assert_array_equal(measures.area, count(0))
    np.testing.assert_array_equal(measures.below, count(-OFFSET))
    np.testing.assert_array_equal(measures.box, box_of_mask(whole > 0))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_are_those_of_whole_masks(logits, size):
    tiling = tile_image(size, LOW, FRAME)
    down, across = (int(np.sum(axis.used > 0)) for axis in (tiling.rows, tiling.columns))
    items = [(m, i, j) for m in range(len(logits)) for i in range(down) for j in range(across)]
    items += [(0, UNUSED, UNUSED)] * (-len(items) % 64)
    batches, matrices = np.array(items).reshape(-1, 64, 3), make_matrices(tiling)
    tiles = np.concatenate([pack(logits, *batch.T, tiling, matrices) for batch in batches])
    tiles = np.unpackbits(tiles, axis=1, bitorder="little")
    assert tiles.shape[1:] == (TILE, TILE)
    step = int(tiling.rows.step), int(tiling.columns.step)
    painted = np.zeros((len(logits), down * step[0], across * step[1]), bool)
    for (m, i, j), tile in zip(items, tiles, strict=True):
        if i == UNUSED:
            assert not tile.any()
            continue
        assert not tile[step[0] :].any()
        assert not tile[:, step[1] :].any()
        painted[m, i * step[0] :, j * step[1] :][: step[0], : step[1]] = tile[: step[0], : step[1]]
    whole = postprocess_masks(logits, size, FRAME) > 0
    np.testing.assert_array_equal(painted[:, : size[0], : size[1]], whole)
    assert painted.sum() == whole.sum()


@pytest.mark.parametrize(
    "size", [(1, 1), (20, 70), (100, 71), (1100, 900), (1500, 2250), (5, MAX_SIDE)]
)
def test_every_pixel_has_a_tile_whose_window_holds_its_logits(size):
    tiling = tile_image(size, LARGE_LOW, LARGE_FRAME)
    for axis, side in zip((tiling.rows, tiling.columns), size, strict=True):
        assert axis.step % 8 == 0
        assert 0 < axis.step <= TILE
        assert axis.used.sum() == side
        assert axis.used[UNUSED] == 0
        assert len(axis.used) == MAX_TILES
        assert (axis.start >= 0).all()
        assert (axis.start + axis.window <= 256).all()
        for tile in np.flatnonzero(axis.used):
            index = axis.index[tile, : axis.used[tile]]
            assert index.min() >= 0
            assert index.max() < axis.window
            np.testing.assert_allclose(axis.weight[tile, : axis.used[tile]].sum(axis=1), 1, 1e-6)


def test_one_program_serves_images_of_all_sizes(logits):
    shapes = {
        jax.tree.map(np.shape, tile_image(size, LARGE_LOW, LARGE_FRAME))
        for size in [(90, 120), (600, 800), (1500, 2250), (MAX_SIDE, 3000)]
    }
    assert len({str(shape) for shape in shapes}) == 1
