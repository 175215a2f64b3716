"""Tests the comparison of two annotations with known pairs and IoUs."""

import json

import numpy as np
import pytest

from sam_jax.data.example import BadSample
from sam_jax.evaluate.quality import (
    Comparison,
    compare,
    format_table,
    match_masks,
    summarize,
)
from tests.sam_jax.evaluate.toy_sources import ToySource, columns


def test_matched_pairs_of_known_ious():
    first = ToySource([[columns(0, 10), columns(20, 40), columns(90, 99)], [columns(0, 100)]])
    second = ToySource([[columns(20, 35), columns(0, 10)], [columns(0, 95)]])
    quality = json.loads(json.dumps(summarize(compare(first, second, [0, 1]))))
    histogram = quality.pop("iou")
    assert quality == {
        "samples": 2,
        "usable": 2,
        "reasons": {},
        "bad": [],
        "pairs": 3,
        "alone": [1, 0],
        "above": {"0.9": round(2 / 3, 4), "0.75": round(2 / 3, 4)},  # 0.75 is not above 0.75
        "mean_iou": 0.9,
    }
    assert sum(histogram["pairs"]) == 3
    assert [histogram["pairs"][i] for i in (37, 47, 49)] == [1, 1, 1]
    assert "3 matched pairs of masks in 2 images" in format_table(quality | {"iou": histogram})
    assert "66.7 % above 0.9, 66.7 % above 0.75, mean 0.900" in format_table(quality)


def test_matching_maximizes_the_sum_of_ious():
    np.testing.assert_array_equal(match_masks(np.array([[0.9, 0.8], [0.7, 0.1]])), [0.8, 0.7])
    np.testing.assert_array_equal(match_masks(np.array([[0.9, 0.2], [0.7, 0.1]])), [0.9, 0.1])
    np.testing.assert_array_equal(match_masks(np.array([[0, 0.5, 0.4]])), [0.5])


def test_disjoint_masks_are_not_matched():
    (found,) = compare(ToySource([[columns(0, 10)]]), ToySource([[columns(10, 20)] * 2]), [0])
    assert (found.masks, found.unmatched, found.iou.shape) == (0, (1, 2), (0,))
    with pytest.raises(ValueError, match="no two masks overlap in 1 images"):
        summarize([found])


def test_an_image_without_masks_in_one_source_has_unmatched_masks():
    none = BadSample("no masks", "the image has no masks")
    first, second = ToySource([[columns(0, 10)], none]), ToySource([none, [columns(0, 10)]])
    assert [found.unmatched for found in compare(first, second, [0, 1])] == [(1, 0), (0, 1)]
    (found,) = compare(ToySource([[]]), ToySource([none]), [0])
    assert (found.reason, found.unmatched) == (None, (0, 0))


def test_images_unusable_in_either_source_are_left_out():
    bad, broken = BadSample("broken json", "cut"), {"size": [4, 100], "counts": [1]}
    first = ToySource([bad, [columns(0, 10)], [columns(0, 10)], [columns(0, 10)]])
    second = ToySource([[columns(0, 10)], bad, [broken], [columns(0, 10)]])
    quality = summarize(compare(first, second, range(4)))
    assert (quality["samples"], quality["usable"], quality["pairs"]) == (4, 1, 1)
    assert quality["reasons"] == {"broken json": 2, "broken mask": 1}
    assert quality["mean_iou"] == 1


def test_sources_of_other_images_are_refused():
    with pytest.raises(ValueError, match="same order to be compared; got 1 images and 2"):
        compare(ToySource([[]]), ToySource([[], []]), [0])
    other = ToySource([[columns(0, 10, size=(100, 4))]])
    with pytest.raises(ValueError, match=r"0\.jpg.*must be of one size; got 4 x 100 and 100 x 4"):
        list(compare(ToySource([[columns(0, 10)]]), other, [0]))


def test_fractions_count_ious_strictly_above_the_threshold():
    iou = np.array([0.75, 0.76, 0.9, 0.91])
    quality = summarize([Comparison(0, "x", 4, iou=iou)])
    assert quality["above"] == {"0.9": 0.25, "0.75": 0.75}
