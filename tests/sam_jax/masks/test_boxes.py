"""Boxes of masks: inclusive corners, empty masks, batches."""

import numpy as np
import pytest

from sam_jax.masks.boxes import box_of_mask, xyxy_to_xywh


def test_corners_are_inclusive():
    mask = np.zeros((10, 20), bool)
    mask[2:5, 7:12] = True
    box = box_of_mask(mask)
    np.testing.assert_array_equal(box, [7, 2, 11, 4])
    assert box.dtype == np.int64
    np.testing.assert_array_equal(xyxy_to_xywh(box), [7, 2, 4, 2])


@pytest.mark.parametrize("corner", [(0, 0), (0, 19), (9, 0), (9, 19)])
def test_one_pixel(corner):
    mask = np.zeros((10, 20), bool)
    mask[corner] = True
    row, column = corner
    np.testing.assert_array_equal(box_of_mask(mask), [column, row, column, row])
    np.testing.assert_array_equal(xyxy_to_xywh(box_of_mask(mask)), [column, row, 0, 0])


def test_whole_image():
    np.testing.assert_array_equal(box_of_mask(np.ones((10, 20), bool)), [0, 0, 19, 9])


@pytest.mark.parametrize("shape", [(0,), (3, 0), (3,), (2, 3), ()])
def test_empty_masks_give_zeros(shape):
    np.testing.assert_array_equal(
        box_of_mask(np.zeros((*shape, 5, 7), bool)), np.zeros((*shape, 4))
    )
    assert box_of_mask(np.zeros((*shape, 0, 7), bool)).shape == (*shape, 4)
    assert box_of_mask(np.zeros((*shape, 5, 0), bool)).shape == (*shape, 4)


def test_batches_equal_one_at_a_time():
    rng = np.random.default_rng(0)
    masks = rng.random((4, 6, 9, 13)) < rng.choice([0.0, 0.01, 0.05, 0.5], (4, 6, 1, 1))
    boxes = box_of_mask(masks)
    assert boxes.shape == (4, 6, 4)
    for index in np.ndindex(4, 6):
        rows, columns = np.nonzero(masks[index])
        expected = [0, 0, 0, 0]
        if rows.size:
            expected = [columns.min(), rows.min(), columns.max(), rows.max()]
        np.testing.assert_array_equal(boxes[index], expected)
        np.testing.assert_array_equal(box_of_mask(masks[index]), expected)


def test_xywh_keeps_dtype_and_axes():
    boxes = np.array([[[1.5, 2.0, 4.0, 8.0]], [[0.0, 0.0, 0.0, 0.0]]], np.float32)
    sizes = xyxy_to_xywh(boxes)
    np.testing.assert_array_equal(sizes, [[[1.5, 2.0, 2.5, 6.0]], [[0.0, 0.0, 0.0, 0.0]]])
    assert sizes.dtype == np.float32
    np.testing.assert_array_equal(boxes[0, 0], [1.5, 2.0, 4.0, 8.0])


@pytest.mark.parametrize("mask", [np.zeros(4, bool), np.zeros((4, 4)), np.zeros((4, 4), np.uint8)])
def test_wrong_masks(mask):
    with pytest.raises(ValueError, match=r"'\.\.\. h w' bool, got (bool|float64|uint8) of shape"):
        box_of_mask(mask)
