"""Tests bicubic interpolation against OpenCV's definition, sample by sample."""

import jax
import numpy as np
import pytest

from sam_jax.model.bicubic import interpolation_matrix, resize_bicubic


@pytest.mark.parametrize(("size", "new_size"), [(14, 64), (64, 14), (7, 7), (1, 5), (5, 1), (3, 4)])
def test_samples_are_weighted_by_a_cubic_kernel(size, new_size):
    samples = np.random.default_rng(0).normal(size=size)

    def kernel(t):
        if abs(t) <= 1:
            return 1.25 * abs(t) ** 3 - 2.25 * t**2 + 1
        return -0.75 * abs(t) ** 3 + 3.75 * t**2 - 6 * abs(t) + 3 if abs(t) < 2 else 0

    expected = []
    for i in range(new_size):
        center = (i + 0.5) * size / new_size - 0.5
        taps = range(int(np.floor(center)) - 1, int(np.floor(center)) + 3)
        expected.append(
            sum(kernel(center - tap) * samples[min(max(tap, 0), size - 1)] for tap in taps)
        )
    found = interpolation_matrix(size, new_size) @ samples
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_two_axes_are_resized_as_by_jax():
    x = np.random.default_rng(1).normal(size=(2, 14, 3, 9)).astype(np.float32)
    found = resize_bicubic(x, (1, 3), (20, 6))
    method = getattr(jax.image.ResizeMethod, "CUBIC_PYTORCH", None)
    if method is None:
        pytest.skip("this version of JAX has no such method")
    expected = jax.image.resize(x, (2, 20, 3, 6), method, antialias=False)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_equal_size_changes_nothing():
    x = np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32)
    np.testing.assert_array_equal(resize_bicubic(x, (0, 1), (3, 5)), x)
