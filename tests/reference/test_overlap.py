"""Checks that the IoU of run lengths is bitwise equal to that of pycocotools."""

import numpy as np
import pytest

from sam_jax.masks import rle
from sam_jax.masks.overlap import iou

coco = pytest.importorskip("pycocotools.mask")

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools
]


@pytest.mark.parametrize(("count", "largest"), [(500, 30), (3, 700)])
def test_random_masks(count, largest):
    rng = np.random.default_rng(0)
    for _ in range(count):
        size = tuple(int(side) for side in rng.integers(1, largest, 2))
        first, second = (
            [_random_mask(rng, *size) for _ in range(rng.integers(1, 9))] for _ in "12"
        )
        np.testing.assert_array_equal(
            iou(first, second), coco.iou(first, second, [0] * len(second))
        )


def _random_mask(rng: np.random.Generator, height: int, width: int) -> dict:
    """Returns a mask with noise of random density in a rectangle, which may be empty."""
    mask = np.zeros((height, width), bool)
    top, bottom = np.sort(rng.integers(0, height + 1, 2))
    left, right = np.sort(rng.integers(0, width + 1, 2))
    mask[top:bottom, left:right] = rng.random((bottom - top, right - left)) < rng.choice([0.3, 1])
    return rle.encode(mask)
