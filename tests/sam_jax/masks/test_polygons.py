"""Tests polygons. tests/reference/test_polygons.py compares pixels with pycocotools."""

import tracemalloc

import numpy as np
import pytest

from sam_jax.masks import polygons, rle
from sam_jax.masks.polygons import PolygonError


def rasterize(corners, size):
    return rle.decode(polygons.rasterize(corners, size))


def box(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def test_a_box_on_pixel_borders_covers_its_pixels():
    mask = np.zeros((6, 9), bool)
    mask[1:4, 2:7] = True
    assert np.array_equal(rasterize([box(2, 1, 7, 4)], (6, 9)), mask)
    assert np.array_equal(rasterize([box(7, 4, 2, 1)], (6, 9)), mask)


def test_a_polygon_larger_than_the_image_fills_it():
    assert rasterize([box(0, 0, 9, 6)], (6, 9)).all()
    assert rasterize([box(-50, -50.5, 90, 1000)], (6, 9)).all()
    assert not rasterize([box(20, 20, 30, 30)], (6, 9)).any()
    assert not rasterize([box(-9, 1, -2, 4)], (6, 9)).any()
    assert not rasterize([[3, 3, 3, 3, 3, 3]], (6, 9)).any()


def test_polygons_are_joined_and_regions_enclosed_twice_are_holes():
    first, second = box(0, 0, 4, 4), box(2, 2, 6, 6)
    both = rasterize([first], (8, 8)) | rasterize([second], (8, 8))
    assert np.array_equal(rasterize([first, second], (8, 8)), both)
    assert not rasterize([first + first[:2] + box(1, 1, 3, 3) + [1, 1]], (8, 8))[2, 2]


def test_a_disc_has_its_area():
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    points = 50 + 40 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert rasterize([points.ravel().tolist()], (100, 100)).sum() == pytest.approx(5027, rel=0.01)


def test_random_polygons_are_joined():
    rng = np.random.default_rng(0)
    for count in [*range(1, 7)] * 5:
        several = [rng.uniform(-5, 25, 2 * rng.integers(3, 9)).tolist() for _ in range(count)]
        union = np.any([rasterize([one], (18, 21)) for one in several], axis=0)
        assert rle.encode(union) == polygons.rasterize(several, (18, 21))


def test_a_large_image_takes_no_memory_for_its_pixels():
    tracemalloc.start()
    mask = polygons.rasterize([box(10, 10, 50, 50), box(8000, 8000, 8050, 8050)], (8192, 8192))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert rle.area(mask) == 40 * 40 + 50 * 50


@pytest.mark.parametrize(
    "corners",
    [
        None,
        [],
        {},
        "polygon",
        [3],
        [[]],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, None]],
        [[1, 2, 3, 4, 5, "6"]],
        [[1, 2, 3, 4, 5, True]],
        [[1, 2, 3, 4, 5, float("inf")]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [[1, 2, 3, 4, 5, 10**400]],
        [[1, 2, 3, 4, 5, 1e7]],
        [[1, 2, 3, 4, 5, 6], None],
        [[-1e6, 0, 1e6, 1, 0, 5]],
        [box(0, 0, 1e5, 1e5)] * 3,
    ],
)
def test_values_that_are_not_polygons_are_errors(corners):
    with pytest.raises(PolygonError):
        polygons.rasterize(corners, (8, 8))
