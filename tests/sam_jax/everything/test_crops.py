"""Tests grids of points and crops."""

import numpy as np
import pytest

from sam_jax.everything.crops import build_point_grid, plan_crops, plan_tile_crops


def test_points_are_centers_of_cells():
    np.testing.assert_allclose(
        build_point_grid(2), [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    )
    np.testing.assert_allclose(build_point_grid(1), [[0.5, 0.5]])


def test_crops_of_sa1b():
    crops = plan_crops((1500, 2250), 2, 512 / 1500)
    assert [crop.layer for crop in crops] == [0] + [1] * 4 + [2] * 16
    assert crops[0].box == (0, 0, 2250, 1500)
    assert crops[1].box == (0, 0, 1381, 1006)
    assert crops[-1].box == (1497, 933, 2250, 1500)
    assert crops[2].box[:2] == (0, crops[2].corner[1])  # y varies fastest
    assert crops[1].size == (1006, 1381)


@pytest.mark.parametrize("size", [(40, 60), (61, 33), (480, 640)])
def test_crops_cover_the_image(size):
    for layer in (0, 1, 2):
        covered = np.zeros(size, bool)
        for crop in plan_crops(size, 2, 0.2):
            if crop.layer == layer:
                crop.extract(covered)[:] = True
                assert crop.extract(covered).shape == crop.size
        assert covered.all()


def test_an_image_too_small_for_crops_is_an_error():
    with pytest.raises(ValueError, match="large enough for 2 layers of crops; got \\(1, 2\\)"):
        plan_crops((1, 2), 2, 0.3)


@pytest.mark.parametrize(
    ("size", "canvas", "tiles"),
    [((640, 1000), (64, 64), 100), ((100, 101), (64, 64), 64), ((90, 500), (64, 32), 128)],
)
def test_tiles_of_one_size_cover_the_image(size, canvas, tiles):
    covered = np.zeros(size, bool)
    crops = plan_tile_crops(size, canvas, tiles, 0.3)
    assert len({crop.size for crop in crops}) == 1
    assert len({crop.box for crop in crops}) == len(crops)
    for crop in crops:
        assert crop.layer == 0
        crop.extract(covered)[:] = True
    assert covered.all()


@pytest.mark.parametrize(
    ("size", "canvas", "sides"),
    [
        ((128, 64), (64, 128), [64]),  # the height halves, though the longer sides are equal
        ((128, 40), (128, 64), []),
        ((500, 120), (128, 64), [128, 256]),
    ],
)
def test_auto_tiles_follow_the_side_that_limits_the_scale(size, canvas, sides):
    crops = plan_tile_crops(size, canvas, "auto", 0.3)
    assert list(dict.fromkeys(max(crop.size) for crop in crops)) == sides


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((64, 64), []),
        ((64, 65), [64]),
        ((40, 128), [64]),
        ((129, 50), [64, 128]),
        ((64, 513), [64, 128, 256, 512]),
    ],
)
def test_auto_tiles_double_their_side_until_they_cover_the_image(size, sides):
    crops = plan_tile_crops(size, (64, 64), "auto", 0.3)
    assert list(dict.fromkeys(max(crop.size) for crop in crops)) == sides
    for side in sides:
        covered = np.zeros(size, bool)
        for crop in crops:
            if max(crop.size) == side:
                crop.extract(covered)[:] = True
        assert covered.all()


def test_tiles_overlap_by_a_part_of_their_side_or_more():
    crops = plan_tile_crops((100, 1000), (64, 64), 100, 0.3)
    assert [crop.corner for crop in crops[:2]] == [(0, 0), (70, 0)]
    assert crops[-1].box == (900, 0, 1000, 100)
    assert len(plan_tile_crops((100, 1000), (64, 64), 100, 1.0)) == 37  # by 3/4 at most


@pytest.mark.parametrize("tiles", [None, "auto", 64, 1000])
def test_an_image_that_fits_into_a_tile_has_no_tiles(tiles):
    assert plan_tile_crops((40, 64), (64, 64), tiles, 0.3) == []
