"""Compares polygons with pycocotools, pixel by pixel."""

import json
from pathlib import Path

import numpy as np
import pytest

from sam_jax.masks import rle
from sam_jax.masks.polygons import rasterize

coco = pytest.importorskip("pycocotools.mask")

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools
]

COCO_TINY = Path(__file__).parents[3] / "shared" / "realdata" / "coco_tiny_train"


def test_random_polygons():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        size = tuple(int(side) for side in rng.integers(1, 80, 2))
        polygons = [_random_polygon(rng, *size) for _ in range(rng.integers(1, 4))]
        _assert_same(polygons, size)


def test_large_polygons():
    rng = np.random.default_rng(1)
    for size in [(1500, 2250), (2000, 3), (3, 2000)]:
        _assert_same([_random_polygon(rng, *size)], size)
        angle = np.linspace(0, 2 * np.pi, 1000, endpoint=False)
        disc = 1 + np.stack([np.cos(angle), np.sin(angle)], axis=1)
        _assert_same([(disc * [size[1] / 2, size[0] / 2]).ravel().tolist()], size)


def test_real_polygons():
    if not COCO_TINY.is_dir():
        pytest.skip(f"no COCO annotations in {COCO_TINY}")
    content = json.loads((COCO_TINY / "instances.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    polygons = [
        (annotation["segmentation"], sizes[annotation["image_id"]])
        for annotation in content["annotations"]
        if isinstance(annotation["segmentation"], list)
    ]
    assert len(polygons) == 465
    for annotation, size in polygons:
        _assert_same(annotation, size)


def _assert_same(polygons, size):
    expected = coco.decode(coco.merge(coco.frPyObjects(polygons, *size)))
    np.testing.assert_array_equal(rle.decode(rasterize(polygons, size)), expected.astype(bool))


def _random_polygon(rng, height, width):
    """Returns corners inside and outside of the image, at fractions, integers or fifths."""
    corners = rng.uniform(rng.choice([-0.5, 0.0]), rng.choice([1.0, 1.5]), (rng.integers(3, 15), 2))
    corners *= [width, height]
    grid = rng.choice([1e6, 1, 5])
    corners = np.round(corners * grid) / grid
    return corners.ravel().tolist()
