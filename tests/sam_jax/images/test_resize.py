"""Tests of resizing to the canvas and back."""

import jax
import numpy as np
import pytest
from PIL import Image

from sam_jax.images import resize
from sam_jax.images.resize import (
    apply_coords,
    fit_size,
    postprocess_masks,
    resize_and_pad,
)

SIZES = [(1200, 1800), (1800, 1200), (37, 1024), (1, 3000), (683, 1024), (1024, 1024), (500, 333)]


@pytest.mark.parametrize("size", SIZES)
def test_the_longest_side_fills_the_canvas(size):
    scale = 1024 / max(size)
    expected = tuple(max(1, int(side * scale + 0.5)) for side in size)
    assert fit_size(size, (1024, 1024)) == expected
    assert max(expected) == 1024


def test_sizes_are_rounded():
    assert fit_size((1200, 1800), (1024, 1024)) == (683, 1024)  # 682.67
    assert fit_size((1000, 1000), (48, 72)) == (48, 48)
    assert fit_size((10, 1000), (48, 72)) == (1, 72)  # 0.72


def test_images_are_resized_by_pillow_and_padded_bottom_right():
    image = np.random.default_rng(0).integers(1, 256, (50, 80, 3), dtype=np.uint8)
    padded, size = resize_and_pad(image, (64, 64))
    assert (padded.shape, padded.dtype, size) == ((64, 64, 3), np.uint8, (40, 64))
    expected = Image.fromarray(image).resize((64, 40), Image.Resampling.BILINEAR)
    assert np.array_equal(padded[:40], expected)
    assert not padded[40:].any()


def test_points_scale_by_the_rounded_sides():
    points = np.array([[0, 0], [1800, 1200], [900, 600]])
    moved = apply_coords(points, (1200, 1800), (1024, 1024))
    assert np.allclose(moved, [[0, 0], [1024, 683], [512, 341.5]])


@pytest.mark.parametrize("canvas", [(64, 64), (48, 72)])
@pytest.mark.parametrize("size", [(30, 40), (201, 97), (64, 64), (5, 150), (48, 72)])
def test_masks_are_resized_twice_and_cropped_between(size, canvas):
    low = np.random.default_rng(0).normal(0, 5, (2, canvas[0] // 2, canvas[1] // 2))
    low = low.astype(np.float32)
    height, width = fit_size(size, canvas)
    expected = jax.image.resize(low, (2, *canvas), "linear", antialias=False)
    expected = expected[:, :height, :width]
    expected = jax.image.resize(expected, (2, *size), "linear", antialias=False)
    actual = postprocess_masks(low, size, canvas)
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(low).max()


def test_one_low_resolution_pixel_is_spread_evenly():
    assert np.array_equal(
        postprocess_masks(np.full((1, 1, 1), 3, np.float32), (4, 5), (8, 8)), np.full((1, 4, 5), 3)
    )


@pytest.mark.parametrize("size", [(90, 140), (140, 90), (48, 72), (20, 30), (1, 700), (700, 1)])
@pytest.mark.parametrize("band", [50, 1000])
def test_bands_give_the_same_pixels(monkeypatch, size, band):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected, input_size = resize_and_pad(image, (48, 72))
    resized = Image.fromarray(image).resize(input_size[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(expected[: input_size[0], : input_size[1]], resized)
    monkeypatch.setattr(resize, "BAND_PIXELS", band)
    np.testing.assert_array_equal(resize_and_pad(image, (48, 72))[0], expected)
    for resample in (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS):
        resized = Image.fromarray(image).resize((33, 61), resample)
        np.testing.assert_array_equal(resize.resize_rgb(image, (61, 33), resample), resized)
    turned = np.rot90(image[:, ::-1])
    np.testing.assert_array_equal(
        resize_and_pad(turned, (72, 48))[0], resize_and_pad(turned.copy(), (72, 48))[0]
    )
