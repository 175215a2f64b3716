"""Tests of small islands and holes. `tests/reference` compares them with OpenCV."""

import numpy as np
import pytest

from sam_jax.masks.regions import remove_small_regions


def picture(text):
    return np.array([[c == "#" for c in row] for row in text.split()])


SPOTTED = picture("""
    ............
    .#####...#..
    .#...#....#.
    .#.#.#......
    .#...#......
    .#####....##
    ..........##
    """)


def test_holes_are_filled_before_islands_are_removed():
    """Uses a dot in a hole, which would be a small island without the filling."""
    cleaned, changed = remove_small_regions(SPOTTED, 9)
    expected = np.zeros_like(SPOTTED)
    expected[1:6, 1:6] = True
    assert changed
    np.testing.assert_array_equal(cleaned, expected)


def test_islands_are_connected_by_corners():
    cleaned, _ = remove_small_regions(SPOTTED, 2)
    assert cleaned[1, 9]
    assert cleaned[2, 10]
    assert not cleaned[3, 3]


def test_large_islands_are_kept():
    cleaned, changed = remove_small_regions(SPOTTED, 1)
    assert not changed
    assert cleaned is SPOTTED


def test_the_largest_of_small_islands_is_kept_if_enabled():
    mask = picture("#.... ...## .....")
    cleaned, changed = remove_small_regions(mask, 5)
    assert changed
    np.testing.assert_array_equal(cleaned, picture("..... ...## ....."))
    cleaned, changed = remove_small_regions(mask, 5, keep_largest=False)
    assert changed
    assert not cleaned.any()
    # A single region that is too small is kept, but the mask counts as changed.
    cleaned, changed = remove_small_regions(cleaned | picture("..... ...## ....."), 5)
    assert changed
    assert cleaned.sum() == 2


def test_background_is_a_hole_only_if_all_of_it_is_small():
    """Uses a mask with 4 columns of background on its left and 40 on its right."""
    mask = np.zeros((10, 45), bool)
    mask[:, 4] = True
    cleaned, _ = remove_small_regions(mask, 41)
    np.testing.assert_array_equal(cleaned[0], np.arange(45) < 5)
    cleaned, changed = remove_small_regions(mask | cleaned, 40)
    assert not changed
    assert cleaned.sum() == 50


@pytest.mark.parametrize("seed", range(5))
def test_the_size_of_the_background_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((30, 40)) < 0.6
    alone, _ = remove_small_regions(np.pad(mask, 60), 25)
    wide, _ = remove_small_regions(np.pad(mask, 200), 25)
    np.testing.assert_array_equal(alone, wide[140:-140, 140:-140])


def test_empty_masks_are_unchanged():
    empty = np.zeros((4, 5), bool)
    cleaned, changed = remove_small_regions(empty, 100)
    assert not changed
    assert not cleaned.any()
