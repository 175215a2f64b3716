"""Tests of crops: boxes, resizing, and images that are too small."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.crop_batch import (
    ASPECT_RATIOS,
    ImageBatch,
    RandomResizedCrop,
    crop,
    middle_box,
    resize,
    sample_box,
)
from sam_jax.data.example import BadSample, Example, Source
from sam_jax.data.loader import Loader
from sam_jax.data.open import ImagesOnly, open_source

MODEL_SIZE = (32, 48)


def boxes(size, min_area=0.2, count=3000):
    rng = np.random.default_rng(0)
    return np.array([sample_box(size, min_area, rng) for _ in range(count)])


def test_sampled_boxes_are_inside_the_image_with_the_given_areas_and_aspects():
    size = (300, 400)
    top, left, height, width = boxes(size).T
    assert (np.minimum(top, left) >= 0).all()
    assert ((top + height <= 300) & (left + width <= 400)).all()
    area, aspect = height * width / np.prod(size), width / height
    assert 0.19 < area.min() < 0.22
    assert 0.9 < area.max() <= 1
    assert ASPECT_RATIOS[0] * 0.98 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < ASPECT_RATIOS[1] * 1.02
    assert abs(np.log(aspect[area < 0.4]).mean()) < 0.02, "as often high as wide"
    for offset, room in ((top, 300 - height), (left, 400 - width)):
        assert abs((offset / np.maximum(room, 1))[room > 20].mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((10, 1000), (0, 493, 10, 13)),
        ((1000, 10), (493, 0, 13, 10)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_an_image_too_long_for_any_crop_gives_the_center_crop(size, box):
    assert (boxes(size, 0.9, 20) == box).all()


@pytest.mark.parametrize(
    ("size", "aspect", "box"),
    [
        ((100, 100), 1.0, (0, 0, 100, 100)),
        ((100, 150), 1.0, (0, 25, 100, 100)),
        ((150, 100), 2.0, (50, 0, 50, 100)),
        ((1, 100), 0.5, (0, 49, 1, 1)),
    ],
)
def test_the_box_of_a_center_crop(size, aspect, box):
    assert middle_box(size, aspect) == box


def test_a_crop_is_cut_before_it_is_resized():
    """Checks that pixels outside of the crop do not affect it."""
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    cut = crop(image, 8, 16, 24, 20)
    around = image.copy()
    around[:8] = around[32:] = 255
    np.testing.assert_array_equal(
        resize(crop(around, 8, 16, 24, 20), MODEL_SIZE), resize(cut, MODEL_SIZE)
    )
    expected = Image.fromarray(cut).resize((48, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize(cut, MODEL_SIZE), np.asarray(expected))


def transform(image, **fields):
    example = Example(image=image, masks=[])
    rng = np.random.default_rng(5)
    return RandomResizedCrop(MODEL_SIZE, min_side=8, **fields)(example, rng)["image"]


def test_images_are_flipped_and_rotated_only_if_enabled():
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :30] = 255  # light on the left
    image[:20, :30] = 128

    def corners(**fields):
        found = set()
        for seed in range(60):
            crop = RandomResizedCrop(MODEL_SIZE, 8, min_area=1.0, **fields)
            x = crop(Example(image, []), np.random.default_rng(seed))["image"].astype(int)
            found.add(tuple(int(x[i, j, 0]) // 64 for i in (3, -3) for j in (3, -3)))
        return found

    assert corners(flips=False) == {(2, 0, 3, 0)}
    assert corners(flips=True) == {(2, 0, 3, 0), (0, 2, 0, 3)}
    assert len(corners(flips=True, rot90=True)) == 8


@pytest.mark.parametrize("size", [(7, 100), (100, 7), (1, 1)])
def test_an_image_smaller_than_a_patch_is_a_bad_sample(size):
    with pytest.raises(BadSample, match=f"8 pixels on each side; got {size[0]} x {size[1]}") as e:
        transform(np.zeros((*size, 3), np.uint8))
    assert e.value.reason == "small image"


def test_an_image_of_a_patch_is_enlarged():
    assert (
        transform(np.full((8, 8, 3), 9, np.uint8)).tolist() == np.full((*MODEL_SIZE, 3), 9).tolist()
    )


@dataclasses.dataclass(frozen=True)
class Fake(Source):
    """A source in which every third image is too small, and whose masks must not be read."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        raise AssertionError("masks are not looked at")

    def image(self, index):
        side = 4 if index % 3 == 0 else 40
        return np.full((side, side, 3), index, np.uint8)

    def name(self, index):
        return f"number {index}"


def test_batches_have_no_masks_and_small_images_are_replaced():
    loader = Loader(
        ImagesOnly(Fake()), np.arange(12), RandomResizedCrop(MODEL_SIZE, 8), batch_size=12, seed=0
    )
    batch, problems = loader.batch(0)
    assert isinstance(batch, ImageBatch)
    assert batch.image.shape == (12, *MODEL_SIZE, 3)
    assert batch.image.dtype == np.uint8
    np.testing.assert_array_equal(batch.image[:, 0, 0, 0], batch.image_id)
    assert not (batch.image_id % 3 == 0).any()
    assert {p.index for p in problems} >= {0, 3, 6, 9}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_hosts_and_workers(workers):
    source = open_source("scenes:40x40", masks=False)
    loaders = [
        Loader(
            source,
            np.arange(50),
            RandomResizedCrop(MODEL_SIZE, 8, rot90=True),
            4,
            0,
            host=i,
            hosts=n,
        )
        for i, n in ((0, 1), (0, 2), (1, 2))
    ]
    one, *two = ([batch for batch, _ in x.batches(1, 3, workers=workers)] for x in loaders)
    for full, *parts in zip(one, *two, strict=True):
        joined = np.concatenate([part.image for part in parts])
        np.testing.assert_array_equal(full.image, joined)
