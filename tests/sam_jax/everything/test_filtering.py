"""Tests that masks are sorted and that duplicates are dropped."""

import numpy as np
import pytest

from sam_jax.everything.candidates import Candidates
from sam_jax.everything.crops import Crop
from sam_jax.everything.filtering import (
    drop_crop_duplicates,
    postprocess_small_regions,
    round_down_to_float32,
    select_masks,
)
from sam_jax.everything.records import SelectedMask
from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask

CROPS = [Crop((0, 0, 100, 100), 0), Crop((40, 30, 100, 100), 1)]
CAPACITY = 4  # one compiled program for all tests


def make_mask(pixels, crop=0, candidate=0):
    return SelectedMask(crop, candidate, box_of_mask(pixels), 0.9, 0.95, rle.encode(pixels))


def rectangle(left, top, right, bottom):
    pixels = np.zeros((100, 100), bool)
    pixels[top : bottom + 1, left : right + 1] = True
    return pixels


def test_masks_are_sorted_by_iou_within_each_crop():
    first = Candidates(
        iou=np.array([0.5, 0.9, 0.7], np.float32),
        stability=np.array([0.1, 0.2, 0.3], np.float32),
        box=np.array([[1, 2, 3, 4]] * 3, np.int32),
        is_kept=np.array([True, False, True]),
    )
    second = first.replace(is_kept=np.array([False, True, False]))
    masks = select_masks(CROPS, [first, second])
    assert [(mask.crop, mask.candidate) for mask in masks] == [(0, 2), (0, 0), (1, 1)]
    assert [mask.iou for mask in masks] == pytest.approx([0.7, 0.5, 0.9])
    assert masks[1].stability == pytest.approx(0.1)
    assert masks[0].box.tolist() == [1, 2, 3, 4]
    assert masks[2].box.tolist() == [41, 32, 43, 34], "boxes are in pixels of the image"
    assert masks[0].segmentation is None


def test_masks_from_smaller_crops_win():
    pixels, other = rectangle(50, 40, 60, 50), rectangle(5, 5, 20, 20)
    masks = [make_mask(pixels), make_mask(other), make_mask(pixels, crop=1)]
    assert drop_crop_duplicates(masks, CROPS, 0.7, CAPACITY) == [masks[2], masks[1]]
    assert drop_crop_duplicates(masks, CROPS, 1.0, CAPACITY) == [masks[2], masks[0], masks[1]]
    assert drop_crop_duplicates([], CROPS, 0.7, CAPACITY) == []


def test_unchanged_masks_win_over_cleaned_ones():
    pixels = rectangle(10, 10, 30, 30)
    dirty = pixels | rectangle(32, 10, 32, 10)
    small = rectangle(80, 80, 81, 81)
    masks = [make_mask(dirty), make_mask(pixels), make_mask(small)]

    def clean(keep_largest, threshold):
        return postprocess_small_regions(
            masks, 9, keep_largest=keep_largest, threshold=threshold, capacity=CAPACITY
        )

    (kept,) = clean(keep_largest=False, threshold=0.7)
    assert kept is masks[1]
    unchanged, cleaned, _ = clean(keep_largest=True, threshold=1.0)
    assert unchanged is masks[1]
    assert cleaned.segmentation == masks[1].segmentation
    assert cleaned.box.tolist() == [10, 10, 30, 30]
    assert len(clean(keep_largest=False, threshold=1.0)) == 2, "the small mask is dropped"


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.7, 0.88, 0.95, 1.0])
def test_rounded_thresholds_compare_like_exact_thresholds(threshold):
    rounded, step = round_down_to_float32(threshold), np.float32(np.inf)
    for value in (rounded, np.nextafter(rounded, step), np.nextafter(rounded, -step)):
        assert (value > rounded) == (float(value) > threshold)
