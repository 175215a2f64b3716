"""Random windows: what they show, and that masks move with their image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sam_jax.data.example import BadSample, Example
from sam_jax.data.jitter import Window, cut_image, sample_window
from sam_jax.data.segmentation_batch import SegmentationTransform
from sam_jax.images.resize import MAX_ZOOM
from sam_jax.masks import rle

CANVAS = (64, 64)


def checkerboard(size, square=16):
    """An image of squares, each of a color of its own, and the mask of every square."""
    rows, columns = (np.arange(side) // square for side in size)
    label = rows[:, None] * (columns[-1] + 1) + columns
    colors = np.random.default_rng(0).integers(0, 256, (label.max() + 1, 3), np.uint8)
    masks = [rle.encode(label == i) for i in range(label.max() + 1)]
    return Example(colors[label], masks), colors


def unpack(row):
    return np.unpackbits(row["masks"], axis=-1, count=row["image"].shape[1]).astype(bool)


sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, st.data())
def test_a_window_of_run_lengths_is_the_window_of_the_resized_mask(size, new_size, data):
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).random(size) < 0.4
    top, left = (data.draw(st.integers(0, side - 1)) for side in new_size)
    height = data.draw(st.integers(1, new_size[0] - top))
    width = data.draw(st.integers(1, new_size[1] - left))
    encoded = rle.encode(mask)
    window = rle.decode_runs_resized(rle.runs(encoded), size, new_size, (top, left, height, width))
    expected = rle.decode_resized(encoded, new_size)[top : top + height, left : left + width]
    np.testing.assert_array_equal(window, expected)


def test_scales_are_uniform():
    rng = np.random.default_rng(0)
    windows = [
        sample_window((400, 300), (1024, 1024), (0.1, 2.0), "canvas", None, rng)
        for _ in range(4000)
    ]
    scales = np.array([window.resized[0] for window in windows]) / 1024
    assert scales.mean() == pytest.approx(1.05, abs=0.03)
    assert scales.min() < 0.11
    assert scales.max() > 1.99


def test_windows_cover_all_of_a_square_image():
    rng = np.random.default_rng(0)
    seen = np.zeros((100, 100), int)
    for _ in range(400):
        window = sample_window((100, 100), CANVAS, (2.0, 2.0), "canvas", None, rng)
        assert window.resized == (128, 128)
        top, left, height, width = (round(x * 100 / 128) for x in window[1:])
        seen[top : top + height, left : left + width] += 1
    # One offset for both axes would leave two of the corners unseen.
    for corner in (seen[:5, :5], seen[:5, -5:], seen[-5:, :5], seen[-5:, -5:]):
        assert corner.max() > 0


def test_a_small_image_is_shown_entirely():
    rng = np.random.default_rng(0)
    window = sample_window((50, 40), CANVAS, (0.5, 0.5), "canvas", None, rng)
    assert window == Window((32, 26), 0, 0, 32, 26)
    window = sample_window((20, 40), CANVAS, (1.0, 1.0), "pixel", None, rng)
    assert window == Window((20, 40), 0, 0, 20, 40)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.integers(30, 300), st.integers(30, 300))
def test_windows_of_objects_contain_the_object(seed, height, width):
    rng = np.random.default_rng(seed)
    left, right = np.sort(rng.integers(0, width, 2))
    top, bottom = np.sort(rng.integers(0, height, 2))
    box = (int(left), int(top), int(right), int(bottom))
    window = sample_window((height, width), CANVAS, (0.2, 0.8), "object", box, rng)
    scale_y, scale_x = window.resized[0] / height, window.resized[1] / width
    assert max(scale_x, scale_y) <= MAX_ZOOM + 0.1
    assert window.top <= top * scale_y + 1
    assert window.top + window.height >= (bottom + 1) * scale_y - 1
    assert window.left <= left * scale_x + 1
    assert window.left + window.width >= (right + 1) * scale_x - 1
    assert window.top + window.height <= window.resized[0]
    assert window.left + window.width <= window.resized[1]


def test_a_cut_equals_the_cut_of_the_resized_image():
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    for resized in ((200, 260), (45, 61)):
        window = Window(resized, 11, 7, 30, 40)
        entire = np.asarray(
            Image.fromarray(image).resize(resized[::-1], Image.Resampling.BILINEAR), int
        )
        difference = cut_image(image, window) - entire[11:41, 7:47]
        assert abs(difference).max() <= 1


@pytest.mark.parametrize("unit", ["canvas", "pixel", "object"])
@pytest.mark.parametrize("canvas", [(64, 64), (48, 80)])
def test_masks_move_with_their_image(unit, canvas):
    example, colors = checkerboard((96, 128))
    scales = {"canvas": (0.8, 2.0), "pixel": (0.7, 2.0), "object": (0.2, 0.6)}[unit]
    transform = SegmentationTransform(canvas, 6, True, True, scales, unit)
    for seed in range(25):
        row = transform(example, np.random.default_rng(seed))
        assert row["image"].shape == (*canvas, 3)
        height, width = row["size"]
        assert not row["image"][height:].any()
        assert not row["image"][:, width:].any()
        for mask, index, valid in zip(unpack(row), row["mask_id"], row["valid"], strict=True):
            assert mask.any() == valid
            assert not mask[height:].any()
            assert not mask[:, width:].any()
            if mask.sum() > 100:
                inside = np.median(row["image"][mask], axis=0)  # the border is blurred
                np.testing.assert_allclose(inside, colors[index], atol=3)


def test_the_object_of_a_window_comes_first():
    example, _ = checkerboard((96, 128), 8)
    transform = SegmentationTransform(CANVAS, 1, jitter=(0.5, 0.5), jitter_unit="object")
    for seed in range(20):
        row = transform(example, np.random.default_rng(seed))
        rows, columns = np.nonzero(unpack(row)[0])
        # Its longer side is half of the canvas, so no neighbor was chosen.
        assert 30 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 33


def test_a_window_without_masks_is_sampled_again():
    mask = np.zeros((100, 100), bool)
    mask[:4, :4] = True
    image = np.zeros((100, 100, 3), np.uint8)
    for unit in ("canvas", "pixel"):
        transform = SegmentationTransform(CANVAS, 2, jitter=(2.0, 3.0), jitter_unit=unit)
        for seed in range(30):
            row = transform(Example(image, [rle.encode(mask)]), np.random.default_rng(seed))
            assert row["valid"].sum() == 1
    empty = Example(image, [rle.encode(np.zeros((100, 100), bool))])
    for unit in ("canvas", "object"):
        transform = SegmentationTransform(CANVAS, 2, jitter=(1.0, 3.0), jitter_unit=unit)
        with pytest.raises(BadSample, match="no masks"):
            transform(empty, np.random.default_rng(0))


def test_a_mask_that_fills_its_window_is_skipped():
    full, part = np.ones((100, 100), bool), np.zeros((100, 100), bool)
    part[40:60, 40:60] = True
    example = Example(np.zeros((100, 100, 3), np.uint8), [rle.encode(full), rle.encode(part)])
    transform = SegmentationTransform(CANVAS, 2, jitter=(1.0, 1.2))
    for seed in range(10):
        row = transform(example, np.random.default_rng(seed))
        assert row["mask_id"][row["valid"]].tolist() == [1]


def test_the_view_determines_the_window_and_not_the_order_of_masks():
    example, _ = checkerboard((96, 128), 8)
    transform = SegmentationTransform(CANVAS, 4, True, True, (0.2, 0.6), "object")

    def sample(seed, view):
        return transform(example, np.random.default_rng(seed), np.random.default_rng((7, view)))

    first, again, other = sample(0, 0), sample(1, 0), sample(0, 1)
    np.testing.assert_array_equal(first["image"], again["image"])
    np.testing.assert_array_equal(first["size"], again["size"])
    assert (first["mask_id"] != again["mask_id"]).any()
    assert (first["image"] != other["image"]).any()
