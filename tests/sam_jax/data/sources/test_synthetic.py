"""Tests that generated scenes are reproducible, and that clicks on them are ambiguous."""

import itertools

import numpy as np
import pytest
import scipy.ndimage

from sam_jax.data.sources import synthetic as scenes_module
from sam_jax.data.sources.synthetic import MIN_AREA, SyntheticScenes
from sam_jax.masks import rle

NUM_SCENES = 150


def masks_of(example):
    return [rle.decode(mask) for mask in example.masks]


def assert_same(a, b):
    np.testing.assert_array_equal(a.image, b.image)
    assert a.masks == b.masks


@pytest.fixture(scope="module")
def scenes():
    """Returns images and masks of scenes."""
    source = SyntheticScenes()
    examples = [source[index] for index in range(NUM_SCENES)]
    return [(example.image, masks_of(example)) for example in examples]


@pytest.fixture(scope="module")
def pairs(scenes):
    """Returns all pairs of masks of a scene, the larger one first."""
    return [
        sorted(pair, key=lambda mask: -mask.sum())
        for _, masks in scenes
        for pair in itertools.combinations(masks, 2)
    ]


def test_a_scene_depends_only_on_its_index():
    source, other = SyntheticScenes(), SyntheticScenes(count=12)
    forwards = [source[index] for index in range(12)]
    backwards = [other[index] for index in reversed(range(12))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert_same(a, b)
    assert_same(source[5], forwards[5])
    assert len({example.image.tobytes() for example in forwards}) == 12


def test_length_names_and_range_of_indices():
    source = SyntheticScenes(count=7)
    assert len(source) == 7
    assert source.name(3) == "scene 3"
    assert source[6].image.shape == (128, 128, 3)
    for index in (7, -1):
        with pytest.raises(IndexError, match=f"index must be 0 to 6; got {index}"):
            source[index]


def test_images_and_masks(scenes):
    for image, masks in scenes:
        assert image.dtype == np.uint8
        assert image.shape == (128, 128, 3)
        assert image.std() > 5
        assert len(masks) >= 1
        assert all(mask.shape == (128, 128) for mask in masks)
    assert np.mean([len(masks) >= 3 for _, masks in scenes]) > 0.5


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (160, 96), (128, 40), (50, 77)])
def test_other_sizes(size):
    source = SyntheticScenes(size=size)
    numbers = []
    for index in range(20):
        example = source[index]
        assert example.image.shape == (*size, 3)
        masks = masks_of(example)
        assert all(mask.shape == size for mask in masks)
        assert all(mask.mean() >= MIN_AREA for mask in masks)
        numbers.append(len(masks))
    assert min(numbers) >= 1
    assert np.mean(numbers) >= 2


def test_masks_are_different_and_large_enough(scenes):
    for _, masks in scenes:
        assert len({mask.tobytes() for mask in masks}) == len(masks)
        assert min(mask.mean() for mask in masks) >= MIN_AREA


def test_masks_are_the_visible_pixels(pairs):
    """Checks that masks share pixels only if one is an object and the other a part of it."""
    shared = [(large & small).sum() for large, small in pairs]
    for (_, small), pixels in zip(pairs, shared, strict=True):
        assert pixels in (0, small.sum())


def test_masks_contrast_with_their_surroundings(scenes):
    distances = []
    for image, masks in scenes:
        for mask in masks:
            if any((other & mask).sum() == other.sum() for other in masks if other is not mask):
                continue  # it has parts with other colors
            around = scipy.ndimage.binary_dilation(mask, iterations=2) & ~mask
            distances.append(np.linalg.norm(image[mask].mean(axis=0) - image[around].mean(axis=0)))
    assert np.percentile(distances, 5) > 40


def test_some_objects_are_occluded(monkeypatch):
    drawn = []
    draw_object = scenes_module.draw_object

    def record(*args):
        regions = draw_object(*args)
        drawn[-1].append(regions[0].copy())
        return regions

    monkeypatch.setattr(scenes_module, "draw_object", record)
    for index in range(NUM_SCENES):
        drawn.append([])
        SyntheticScenes()[index]
    overlap = [(np.sum(objects, axis=0) >= 2).any() for objects in drawn]
    assert np.mean(overlap) > 0.5


def test_clicks_are_ambiguous_often_enough(scenes, pairs):
    """Checks that many pixels are in several masks, and that most scenes have such pixels."""
    covers = [np.sum(masks, axis=0) for _, masks in scenes]
    several = sum((cover >= 2).sum() for cover in covers) / sum((c >= 1).sum() for c in covers)
    assert several > 0.1
    assert np.mean([cover.max() >= 2 for cover in covers]) > 0.5
    assert max(cover.max() for cover in covers) >= 3  # a part of a part
    nested = [small.sum() / large.sum() for large, small in pairs if (large & small).any()]
    assert np.mean(np.array(nested) < 0.8) > 0.8  # and the areas of the masks differ


def test_masks_are_of_several_sizes(scenes):
    areas = np.array([mask.mean() for _, masks in scenes for mask in masks])
    assert np.percentile(areas, 90) > 4 * np.percentile(areas, 10)
    assert areas.max() < 0.9
