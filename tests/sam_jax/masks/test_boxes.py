"""Tests boxes of masks: inclusive corners, empty masks, and batches."""

import numpy as np
import pytest

from sam_jax.masks.boxes import box_of_mask, non_maximum_suppression, xyxy_to_xywh


def test_corners_are_inclusive():
    mask = np.zeros((10, 20), bool)
    mask[2:5, 7:12] = True
    box = box_of_mask(mask)
    np.testing.assert_array_equal(box, [7, 2, 11, 4])
    assert box.dtype == np.int64
    np.testing.assert_array_equal(xyxy_to_xywh(box), [7, 2, 4, 2])


@pytest.mark.parametrize("corner", [(0, 0), (0, 19), (9, 0), (9, 19)])
def test_box_of_one_pixel(corner):
    mask = np.zeros((10, 20), bool)
    mask[corner] = True
    row, column = corner
    np.testing.assert_array_equal(box_of_mask(mask), [column, row, column, row])
    np.testing.assert_array_equal(xyxy_to_xywh(box_of_mask(mask)), [column, row, 0, 0])


def test_box_of_a_full_mask():
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
def test_wrong_masks_are_errors(mask):
    with pytest.raises(ValueError, match=r"'\.\.\. h w' bool, got (bool|float64|uint8) of shape"):
        box_of_mask(mask)


def suppress(boxes, scores, threshold, valid=None):
    valid = np.ones(len(boxes), bool) if valid is None else np.array(valid)
    boxes, scores = np.array(boxes, np.float32), np.array(scores, np.float32)
    kept = non_maximum_suppression(boxes, scores, valid, np.float32(threshold))
    return np.flatnonzero(kept).tolist()


# The IoU of neighbors is 0.6. The IoU of the first and the third box is 1 / 3.
CHAIN = [[0, 0, 8, 4], [2, 0, 10, 4], [4, 0, 12, 4]]


def test_dropped_boxes_do_not_suppress_others():
    assert suppress(CHAIN, [3, 2, 1], 0.5) == [0, 2]
    assert suppress(CHAIN, [2, 3, 1], 0.5) == [1]


def test_an_iou_equal_to_the_threshold_is_kept():
    assert suppress(CHAIN[:2], [1, 2], 0.6) == [0, 1]
    assert suppress(CHAIN[:2], [1, 2], np.nextafter(np.float32(0.6), 0)) == [1]


def test_ties_go_to_the_first():
    assert suppress([CHAIN[0]] * 3, [1, 1, 1], 0.5) == [0]


def test_invalid_boxes_are_ignored():
    assert suppress(CHAIN, [3, 2, 1], 0.5, valid=[False, True, True]) == [1]
    assert suppress(CHAIN, [3, 2, 1], 0.5, valid=[False] * 3) == []


def test_boxes_without_area_are_kept():
    assert suppress([[1, 1, 1, 1]] * 2, [1, 2], 0.1) == [0, 1]


def test_kept_boxes_do_not_overlap_and_dropped_ones_overlap_a_better_one():
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 60, (400, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 50, (400, 2))], axis=1)
    scores = rng.integers(0, 30, 400)
    kept = suppress(boxes, scores, 0.4)
    low, high = np.split(boxes.astype(float), 2, axis=1)
    sides = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    inter, area = sides.clip(0).prod(axis=2), (high - low).prod(axis=1)
    with np.errstate(invalid="ignore"):
        near = inter / (area[:, None] + area - inter) > 0.4
    better = np.lexsort([np.arange(400), -scores]).argsort()  # the rank of each box
    for i in range(400):
        rivals = [j for j in kept if near[i, j] and better[j] < better[i]]
        assert (i in kept) == (not rivals)
