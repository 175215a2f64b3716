"""Tiles lie in the image, contain the prompts, and are chosen by the prompt alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_jax.predict.tiles import (
    MASK_SHARE,
    Tile,
    plan_pyramid,
    tile_for_box,
    tile_for_object,
    tile_starts,
    tiles_for_points,
)

NO_POINTS = np.zeros((0, 2))
SIDES = st.integers(1, 30_000)
FRACTIONS = st.floats(0, 1)


@st.composite
def pyramids(draw):
    size = draw(SIDES), draw(SIDES)
    canvas = draw(st.sampled_from([(64, 64), (48, 72), (1024, 1024), (1024, 512)]))
    tiles = draw(st.sampled_from(["auto", 16, 100, 2000]))
    return plan_pyramid(size, canvas, tiles)


def points_in(pyramid, *fractions):
    height, width = pyramid.image_size
    return np.array(fractions).reshape(-1, 2) * (width, height)


def assert_inside(pyramid, tile, points):
    height, width = pyramid.image_size
    assert tile.top >= 0
    assert tile.left >= 0
    assert tile.top + tile.height <= height
    assert tile.left + tile.width <= width
    relative = np.array(points) - tile.corner
    assert (relative >= 0).all()
    assert (relative <= (tile.width, tile.height)).all()


@given(pyramids(), *[FRACTIONS] * 6)
def test_tiles_contain_the_box_and_its_points(pyramid, a, b, c, d, e, f):
    corners = points_in(pyramid, (min(a, b), min(c, d)), (max(a, b), max(c, d)))
    point = points_in(pyramid, (e, f))
    alone = tile_for_box(pyramid, corners.ravel(), NO_POINTS)
    assert_inside(pyramid, alone, corners)
    assert_inside(pyramid, tile_for_box(pyramid, corners.ravel(), point), [*corners, *point])


@given(st.sampled_from([(1024, 1024), (1024, 512)]), SIDES, SIDES, *[FRACTIONS] * 4)
def test_a_box_takes_most_of_its_tile(canvas, height, width, left, top, length, aspect):
    """Unless it is smaller than that in the smallest tile or larger than that in the image."""
    pyramid = plan_pyramid((height, width), canvas, "auto")
    box = np.array([left * width, top * height, 0, 0])
    longer = min(height, width) ** length
    box[2:] = box[:2] + np.array([longer, longer * aspect])
    box[2:] = np.minimum(box[2:], (width, height))
    tile = tile_for_box(pyramid, box, NO_POINTS)
    if tile == pyramid.image_tile:
        return
    sides = (box[2:] - box[:2]) / (tile.width, tile.height)
    full_sides = [tile.width < width, tile.height < height]
    assert (sides[full_sides] <= 0.9).all()
    if tile.height > 0.15 * canvas[0]:  # not one of the finest level
        scale = max(tile.height / canvas[0], tile.width / canvas[1])
        assert max((box[3] - box[1]) / canvas[0], (box[2] - box[0]) / canvas[1]) >= 0.41 * scale


def test_levels_grow_up_to_the_image():
    pyramid = plan_pyramid((3000, 5000), (1024, 1024), "auto")
    assert pyramid.scales[0] == 1 / 16
    np.testing.assert_allclose(np.diff(np.log2(pyramid.scales[:-1])), 0.5)
    assert pyramid.scales[-1] == 5000 / 1024
    assert plan_pyramid((3000, 5000), (1024, 1024), 2048).scales == (2, 5000 / 1024)


@pytest.mark.parametrize("tiles", ["auto", 512, None])
def test_an_image_that_fits_into_a_tile_is_the_only_one(tiles):
    assert len(plan_pyramid((64, 50), (1024, 1024), tiles).scales) == 1


@given(pyramids(), FRACTIONS, FRACTIONS)
def test_points_have_a_tile_of_every_octave_from_a_zoom_of_four(pyramid, x, y):
    points = points_in(pyramid, (x, y))
    tiles = tiles_for_points(pyramid, points)
    finer = pyramid.scales[:-1]
    coarse = [scale for scale in finer if scale >= 1 / 4]
    assert len(tiles) == len((coarse or finer[-1:])[::2]) + 1
    assert tiles[-1] == pyramid.image_tile
    for tile in tiles:
        assert_inside(pyramid, tile, points)


def test_points_far_apart_have_coarse_tiles_only():
    pyramid = plan_pyramid((4096, 4096), (1024, 1024), "auto")
    tiles = tiles_for_points(pyramid, np.array([[1000.0, 1000], [1900, 1400]]))
    assert min(tile.width for tile in tiles) == 2048
    for tile in tiles[:-1]:
        assert tile.left <= 1000 - tile.width / 8
        assert tile.left + tile.width >= 1900 + tile.width / 8


def test_prompts_outside_of_the_image_have_tiles_at_its_border():
    pyramid = plan_pyramid((4096, 4096), (1024, 1024), "auto")
    tile = tile_for_box(pyramid, np.array([-50.0, 4000, 250, 4300]), NO_POINTS)
    assert (tile.left, tile.top + tile.height) == (0, 4096)
    assert tile.width < 1024
    assert tiles_for_points(pyramid, np.array([[9e3, -9e3]]))[0] == Tile(0, 4096 - 256, 256, 256)


@given(pyramids(), *[FRACTIONS] * 6)
def test_the_tile_of_an_object_contains_it_and_all_points(pyramid, a, b, c, d, e, f):
    corners = np.sort(points_in(pyramid, (a, b), (c, d)), axis=0)
    points = points_in(pyramid, (e, f))
    tile = tiles_for_points(pyramid, points)[0]
    found = tile_for_object(pyramid, tile, corners.ravel(), points)
    assert_inside(pyramid, found, np.concatenate([corners, points]))
    # What is predicted in the new tile stays there.
    box = tile_for_box(pyramid, corners.ravel(), points, MASK_SHARE)
    assert found in (tile, box)


def test_an_object_keeps_its_tile_while_it_fills_a_good_share_of_it():
    pyramid = plan_pyramid((4096, 4096), (1024, 1024), "auto")
    tile = tile_for_box(pyramid, np.array([1000.0, 1000, 1400, 1400]), NO_POINTS)

    def find(side):
        box = np.array([1200 - side / 2, 1200 - side / 2, 1200 + side / 2, 1200 + side / 2])
        return tile_for_object(pyramid, tile, box, np.array([[1200.0, 1200]]))

    assert [find(tile.width * share) for share in (0.32, 0.5, 0.88)] == [tile] * 3
    assert find(tile.width * 0.1).width < tile.width
    assert find(tile.width * 0.95).width > tile.width


@given(st.integers(1, 5000), FRACTIONS, st.integers(1, 500))
def test_tiles_cover_a_side(side, fraction, stride):
    tile_side = max(1, round(side * fraction))
    starts = tile_starts(side, tile_side, min(stride, tile_side))
    assert starts[0] == 0
    assert starts[-1] + tile_side == side
    assert (np.diff(starts) > 0).all()
    assert (np.diff(starts) <= tile_side).all()
