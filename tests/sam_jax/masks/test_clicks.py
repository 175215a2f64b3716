"""Tests of uniform clicks and of clicks on the center of a region."""

import jax
import numpy as np
import pytest
import scipy.stats

from sam_jax.masks.clicks import center_click, center_click_on_error, uniform_click

KEYS = jax.random.split(jax.random.key(0), 20_000)
RNG = np.random.default_rng(0)
REGIONS = {
    "scattered": RNG.random((9, 13)) < 0.3,
    "uneven rows": np.arange(13) < np.array([0, 13, 1, 0, 12, 2, 0, 5, 0])[:, None],
    "full": np.ones((9, 13), bool),
    "last column": np.arange(13) == np.full((9, 1), 12),
}


@pytest.fixture(scope="module")
def clicks(jit):
    """Returns a function that clicks on a region of 9 by 13 with each key."""
    return jit(jax.vmap(uniform_click, (0, None)))


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_uniform_clicks_are_uniform(clicks, region):
    xy = np.asarray(clicks(KEYS, region))
    assert xy.dtype == np.int32
    assert region[xy[:, 1], xy[:, 0]].all()
    hits = np.zeros(region.shape, int)
    np.add.at(hits, (xy[:, 1], xy[:, 0]), 1)
    assert scipy.stats.chisquare(hits[region]).pvalue > 1e-3


@pytest.mark.parametrize(("x", "y"), [(0, 0), (12, 0), (0, 8), (12, 8), (5, 3)])
def test_one_pixel(clicks, x, y):
    region = np.zeros((9, 13), bool)
    region[y, x] = True
    np.testing.assert_array_equal(clicks(KEYS, region), np.tile([x, y], (len(KEYS), 1)))


def test_an_empty_region_gives_the_origin(clicks):
    np.testing.assert_array_equal(clicks(KEYS, np.zeros((9, 13), bool)), 0)


# Farthest from the border.


def distances(region):
    """Returns the distance of each pixel of a region to the nearest pixel outside of it."""
    padded = np.pad(region, 1)
    outside = np.argwhere(~padded)
    gaps = np.argwhere(padded)[:, None] - outside
    found = np.zeros(padded.shape)
    found[padded] = np.sqrt((gaps**2).sum(axis=-1)).min(axis=1)
    return found[1:-1, 1:-1]


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9, 0.99, 1.0])
def test_a_center_click_is_the_first_of_the_farthest_pixels(density):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        region = rng.random(rng.integers(1, 20, 2)) < density
        if not region.any():
            continue
        found = distances(region)
        y, x = np.unravel_index(np.argmax(found), found.shape)
        assert center_click(region) == (x, y, pytest.approx(found.max()))


def test_center_clicks_on_known_regions():
    region = np.zeros((9, 12), bool)
    region[2:7, 3:8] = True  # 5 by 5: the distance of its center to the outside is 3
    region[0:3, 9:12] = True  # at a corner of the image, whose sides are borders too
    assert center_click(region) == (5, 4, 3.0)
    region[2:7, 3:8] = False
    assert center_click(region) == (10, 1, 2.0)
    assert center_click(np.ones((4, 4), bool)) == (1, 1, 2.0)  # the first of four
    assert center_click(np.zeros((4, 4), bool)) == (0, 0, 0.0)


def test_a_click_on_the_largest_error():
    target = np.zeros((12, 20), bool)
    target[1:8, 1:8] = True
    nothing = np.zeros_like(target)
    assert center_click_on_error(target, target) is None
    assert center_click_on_error(nothing, target) == (4, 4, 1)  # missed
    assert center_click_on_error(target, nothing) == (4, 4, 0)  # added
    # There are 5 by 5 missed pixels, and separately 7 by 7 added pixels.
    added, missed = nothing.copy(), nothing.copy()
    added[2:9, 11:18] = True
    missed[3:8, 4:9] = True
    assert center_click_on_error(added, missed) == (14, 5, 0)
    assert center_click_on_error(missed, added) == (14, 5, 1)


def test_added_pixels_win_a_tie():
    missed, added = np.zeros((9, 20), bool), np.zeros((9, 20), bool)
    missed[2:7, 2:7] = True
    added[2:7, 12:17] = True
    assert center_click_on_error(added, missed) == (14, 4, 0)
    added[2:7, 17] = added[2:7, 11] = True  # a longer region has the same distance
    assert center_click_on_error(added, missed)[2] == 0
    missed[1:8, 1:8] = True
    assert center_click_on_error(added, missed) == (4, 4, 1)
