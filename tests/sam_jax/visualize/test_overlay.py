"""Tests that every drawn mask is visible, and that other pixels keep their brightness."""

import numpy as np
import pytest
from PIL import Image

from sam_jax.masks import rle
from sam_jax.visualize.overlay import (
    BACKGROUND_COLOR,
    BOX_COLOR,
    FOREGROUND_COLOR,
    MASK_COLOR,
    draw_masks,
    draw_overlay,
)

SIZE = (60, 90)
IMAGE = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def box(y0, x0, y1, x1):
    mask = np.zeros(SIZE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_small_masks_are_above_large_ones_and_the_rest_is_unchanged():
    large, small, separate = box(5, 5, 45, 60), box(20, 20, 30, 30), box(10, 70, 30, 80)
    drawn = draw_masks(np.full((*SIZE, 3), 100, np.uint8), [small, separate, large])
    outside = ~(large | separate)
    assert (drawn[outside] == 100).all()
    colors = [drawn[y, x].tolist() for y, x in ((10, 10), (25, 25), (20, 75))]
    assert len(set(map(tuple, colors))) == 3
    inner = np.zeros(SIZE, bool)
    inner[21:29, 21:29] = True
    assert (drawn[inner] == colors[1]).all()
    assert (drawn[6:20, 6:59] == colors[0]).all()
    for edge in (drawn[5, 5:60], drawn[20, 20:30], drawn[29, 20:30], drawn[10:30, 79]):
        assert (edge == edge[0]).all()
        assert (edge >= 200).all()  # nearly white


def test_run_lengths_are_drawn_like_arrays_in_any_order():
    rng = np.random.default_rng(1)
    masks = [box(0, 0, 60, 90), box(0, 0, 1, 1), box(30, 70, 50, 80), box(5, 75, 25, 85)]
    masks += [rng.random(SIZE) < 0.1, box(3, 0, 4, 90), box(7, 0, 40, 50), np.zeros(SIZE, bool)]
    expected = draw_masks(IMAGE, masks)
    encoded = [rle.encode(mask) for mask in masks]
    np.testing.assert_array_equal(draw_masks(IMAGE, encoded), expected)
    np.testing.assert_array_equal(draw_masks(IMAGE, encoded[::-1]), expected)
    lists = [{"size": e["size"], "counts": rle.runs(e).tolist()} for e in encoded]
    np.testing.assert_array_equal(draw_masks(IMAGE, lists), expected)


def test_colors_differ_most_between_masks_of_similar_size():
    gray = np.full((*SIZE, 3), 128, np.uint8)
    strips = [box(2, 9 * i, 58 - i, 9 * i + 8) for i in range(10)]
    drawn = draw_masks(gray, strips).astype(int)
    colors = np.array([drawn[20, 9 * i + 4] for i in range(10)])
    distance = np.abs(colors[:, None] - colors).sum(axis=-1) + 1000 * np.eye(10)
    assert distance.min() > 20
    assert np.diag(distance, 1).min() > 60


def test_only_masks_have_colors():
    gray = np.repeat(np.asarray(Image.fromarray(IMAGE).convert("L"))[..., None], 3, axis=2)
    np.testing.assert_allclose(draw_masks(IMAGE, []), gray, atol=1)
    np.testing.assert_array_equal(draw_masks(IMAGE, [np.zeros(SIZE, bool)]), draw_masks(IMAGE, []))
    mask = box(10, 20, 30, 40)
    drawn = draw_masks(IMAGE, [mask])
    np.testing.assert_array_equal(drawn[~mask], draw_masks(IMAGE, [])[~mask])
    assert (np.ptp(drawn[11:29, 21:39].astype(int), axis=-1) > 80).all()


def test_masks_of_another_size_are_refused():
    message = r"masks must be of the image's size \(60, 90\); got \(90, 60\)"
    for mask in (np.ones((90, 60), bool), rle.encode(np.ones((90, 60), bool))):
        with pytest.raises(ValueError, match=message):
            draw_masks(IMAGE, [mask])


def test_the_overlay_tints_the_mask_and_marks_the_prompts():
    gray = np.full((*SIZE, 3), 100, np.uint8)
    mask = box(10, 10, 50, 50)
    drawn = draw_overlay(gray, mask, [(30, 30), (75, 30)], [1, 0], box=(5, 5, 55, 55))
    assert drawn[45, 45].tolist() == [round((100 + c) / 2) for c in MASK_COLOR]
    assert drawn[10, 30].tolist() == [255, 255, 255]
    assert tuple(drawn[30, 30]) == FOREGROUND_COLOR
    assert tuple(drawn[30, 75]) == BACKGROUND_COLOR
    assert tuple(drawn[5, 30]) == BOX_COLOR
    assert (drawn[58:, :] == 100).all()
    with pytest.raises(ValueError, match="zip"):
        draw_overlay(gray, mask, [(30, 30)], [])
