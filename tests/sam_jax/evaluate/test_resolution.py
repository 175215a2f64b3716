"""The bound of a model's resolution."""

import numpy as np
import pytest
from einops import reduce

from sam_jax.evaluate.resolution import (
    _average,
    cut_to_tile,
    format_resolution,
    resolution_bound,
    summarize_resolution,
)

CANVAS, LOW_RES = (64, 64), (32, 32)


def disk(side, radius):
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return y**2 + x**2 <= radius**2


def test_averaging_is_the_mean_of_blocks_where_blocks_are_pixels():
    image = np.random.default_rng(0).random((64, 64))
    matrix = _average(64, 64, 64, 32)
    expected = reduce(image, "(h i) (w j) -> h w", "mean", i=2, j=2)
    np.testing.assert_allclose(matrix @ image @ matrix.T, expected)


def test_averaging_keeps_the_total_at_any_scale():
    rng = np.random.default_rng(0)
    for size, input_size in ((100, 64), (40, 64), (97, 33), (64, 1)):
        matrix = _average(size, input_size, 64, 32)
        line = rng.random(size)
        pixel = 64 / 32 * size / input_size  # a decoder pixel in pixels of the image
        assert (matrix @ line).sum() * pixel == pytest.approx(line.sum())


def test_a_half_plane_along_pixel_borders_is_reproduced():
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    assert resolution_bound(mask, CANVAS, LOW_RES) == 1


def test_larger_objects_have_higher_bounds():
    bounds = [resolution_bound(disk(256, r), CANVAS, LOW_RES) for r in (2, 8, 30, 100)]
    assert bounds == sorted(bounds)
    assert bounds[-1] > 0.97
    assert bounds[0] < 0.6


def test_a_finer_decoder_has_a_higher_bound():
    mask = disk(200, 15)
    coarse, fine = (resolution_bound(mask, CANVAS, (n, n)) for n in (16, 64))
    assert fine > coarse + 0.05


def test_padding_does_not_matter():
    mask = disk(64, 20)[:40]
    wide = resolution_bound(mask, (40, 64), (20, 32))
    padded = resolution_bound(mask, (64, 64), (32, 32))
    assert padded == pytest.approx(wide, abs=0.01)


def test_a_mask_that_vanishes_has_bound_0():
    mask = np.zeros((640, 640), bool)
    mask[5, 5] = True
    assert resolution_bound(mask, CANVAS, LOW_RES) == 0


def test_sides_are_in_pixels_of_the_decoder():
    masks = [np.zeros((128, 96), bool) for _ in range(3)]
    for mask, side in zip(masks, (8, 16, 32), strict=True):
        mask[4 : 4 + side, 4:8] = True
    summary = summarize_resolution(masks, CANVAS, LOW_RES)
    assert summary["objects"] == 3
    assert summary["side"]["50"] == 4.0
    assert "4.0 decoder pixels" in format_resolution(summary)
    with pytest.raises(ValueError, match="at least one mask"):
        summarize_resolution([], CANVAS, LOW_RES)


def test_a_small_object_is_cut_to_its_tile():
    mask = np.zeros((400, 300), bool)
    mask[300:310, 200:216] = disk(16, 7.5)[3:13]
    np.testing.assert_array_equal(cut_to_tile(mask, CANVAS, None), mask)
    cut = cut_to_tile(mask, CANVAS, "auto")
    assert cut.sum() == mask.sum()
    assert max(cut.shape) <= 64
    entire, tiled = (resolution_bound(m, CANVAS, LOW_RES) for m in (mask, cut))
    assert tiled > entire + 0.2
    with pytest.raises(ValueError, match="tiles must be"):
        cut_to_tile(mask, CANVAS, "all")
