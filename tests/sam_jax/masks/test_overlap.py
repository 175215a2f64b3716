"""Tests the IoU of arrays and of run lengths."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_jax.masks import rle
from sam_jax.masks.overlap import iou, mask_iou


def rectangle(top, left, bottom, right):
    mask = np.zeros((10, 12), bool)
    mask[top:bottom, left:right] = True
    return rle.encode(mask)


def iou_of_arrays(first, second):
    """Computes the IoU 'n k' of masks 'n h w' and 'k h w'. It is 0 for two empty masks."""
    intersection = (first[:, None] & second).sum(axis=(2, 3))
    union = (first[:, None] | second).sum(axis=(2, 3))
    return intersection / np.maximum(union, 1)


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_mask_iou_by_hand(asarray):
    square, shifted = np.zeros((2, 10, 12), bool)
    square[2:6, 2:6] = shifted[2:6, 4:8] = True  # 16 pixels each, 8 in common
    assert float(mask_iou(asarray(square), asarray(shifted))) == pytest.approx(8 / 24, rel=1e-7)
    assert mask_iou(asarray(square), asarray(square)) == 1
    assert mask_iou(asarray(square), asarray(~square)) == 0


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_empty_masks_have_mask_iou_one(asarray):
    empty, full = asarray(np.zeros((3, 4), bool)), asarray(np.ones((3, 4), bool))
    assert mask_iou(empty, empty) == 1
    assert mask_iou(empty, full) == 0
    no_pixels = asarray(np.zeros((2, 0, 4), bool))
    np.testing.assert_array_equal(mask_iou(no_pixels, no_pixels), [1, 1])


def test_mask_iou_broadcasts_and_keeps_the_kind_of_array():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 1, 8, 9)) < 0.5, rng.random((4, 8, 9)) < 0.5
    expected = iou_of_arrays(a.reshape(6, 8, 9), b).reshape(2, 3, 4)
    actual = mask_iou(a, b)
    assert isinstance(actual, np.ndarray)
    assert actual.dtype == np.float64
    np.testing.assert_array_equal(actual, expected)
    for function in (mask_iou, jax.jit(mask_iou)):
        actual = function(jnp.asarray(a), jnp.asarray(b))
        assert isinstance(actual, jax.Array)
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_by_hand():
    square, shifted = rectangle(2, 2, 6, 6), rectangle(2, 4, 6, 8)  # 16 pixels, 8 in common
    below, full = rectangle(7, 2, 9, 6), rectangle(0, 0, 10, 12)
    expected = [[1, 8 / 24, 0, 16 / 120], [8 / 24, 1, 0, 16 / 120]]
    actual = iou([square, shifted], [square, shifted, below, full])
    assert actual.dtype == np.float64
    np.testing.assert_array_equal(actual, expected)


def test_masks_that_only_touch_or_interlock_do_not_overlap():
    columns = np.zeros((2, 6, 8), bool)
    columns[0, :, ::2] = columns[1, :, 1::2] = True
    even, odd = map(rle.encode, columns)
    np.testing.assert_array_equal(iou([even], [odd, even]), [[0, 1]])
    np.testing.assert_array_equal(iou([rectangle(0, 0, 5, 6)], [rectangle(5, 0, 9, 6)]), [[0]])


@st.composite
def several_masks(draw):
    """Returns random masks 'n h w' and 'k h w'."""
    size = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))

    def masks():
        return hnp.arrays(np.bool_, (draw(st.integers(0, 3)), *size))

    return draw(masks()), draw(masks())


@given(several_masks())
def test_iou_equals_that_of_decoded_masks(masks):
    first, second = masks
    actual = iou([rle.encode(mask) for mask in first], [rle.encode(mask) for mask in second])
    np.testing.assert_array_equal(actual, iou_of_arrays(first, second))


def test_empty_masks_have_zero_iou():
    empty = rectangle(0, 0, 0, 0)
    np.testing.assert_array_equal(iou([empty], [empty, rectangle(0, 0, 2, 2)]), [[0, 0]])
    no_pixels = {"size": [0, 7], "counts": ""}
    np.testing.assert_array_equal(iou([no_pixels], [no_pixels]), [[0]])


def test_empty_runs_in_the_middle_and_lists_are_read():
    padded = {"size": [10, 12], "counts": [0, 0, 2, 3, 0, 1, 114]}
    same = {"size": (10, 12), "counts": [2, 4, 114]}
    np.testing.assert_array_equal(iou([padded], [same, padded]), [[1, 1]])


def test_no_masks():
    squares = [rectangle(0, 0, 2, 2)] * 2
    assert [iou(*masks).shape for masks in ([[], []], [squares, []], [[], squares])] == [
        (0, 0),
        (2, 0),
        (0, 2),
    ]


def test_large_masks_are_exact():
    side = 2**13
    half = {"size": [side, side], "counts": [2**25, 2**25]}
    all_but_one = {"size": [side, side], "counts": [1, 2**26 - 1]}
    np.testing.assert_array_equal(iou([half], [all_but_one]), [[2**25 / (2**26 - 1)]])


def test_errors_name_the_problem():
    other = {"size": [12, 10], "counts": [120]}
    with pytest.raises(ValueError, match="of one size; got 10 x 12 and 12 x 10"):
        iou([rectangle(0, 0, 2, 2)], [other])
    with pytest.raises(ValueError, match="of one size"):
        iou([other, rectangle(0, 0, 2, 2)], [])
    with pytest.raises(rle.RLEError, match="must sum to"):
        iou([{"size": [2, 2], "counts": [3]}], [])
