"""The summary of its masks that a run prints before it trains."""

import logging

import numpy as np
import pytest

from sam_jax.data.example import Example
from sam_jax.data.loader import Loader
from sam_jax.data.segmentation_batch import SegmentationTransform
from sam_jax.masks import rle
from sam_jax.model.sam import sam_tiny
from tests.sam_jax.evaluate.toy_sources import ToySource
from train.mask_summary import (
    MAX_MASKS,
    choose_masks,
    describe_slots,
    load_batches,
    print_mask_summary,
)

MODEL = sam_tiny(image_size=(64, 64), patch_size=8)  # its masks have 32 by 32 pixels


def squares(side, per_image):
    """Returns images of 128 by 128 pixels with squares at odd pixels."""
    examples = []
    for i in range(20):
        masks = np.zeros((per_image, 128, 128), bool)
        for k, mask in enumerate(masks):
            mask[5 + i : 5 + i + side, 9 + k : 9 + k + side] = True
        image = np.zeros((128, 128, 3), np.uint8)
        examples.append(Example(image, [rle.encode(mask) for mask in masks]))
    return ToySource(examples)


def loader(source, masks_per_image, **transform):
    transform = SegmentationTransform((64, 64), masks_per_image, **transform)
    return Loader(source, np.arange(20), transform, batch_size=4, seed=0, host=1, hosts=2)


def test_masks_that_are_large_enough_have_no_warning(capsys, caplog):
    with caplog.at_level(logging.WARNING):
        print_mask_summary(MODEL, loader(squares(100, 2), 2))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("masks    objects are 25.0 decoder pixels long")
    assert second == "slots    100 % of the mask slots of a batch hold masks"
    assert not caplog.records


def test_masks_that_are_too_small_have_a_warning_that_names_fields(capsys, caplog):
    with caplog.at_level(logging.WARNING):
        print_mask_summary(MODEL, loader(squares(7, 1), 4))
    first, second = capsys.readouterr().out.splitlines()
    assert "1.8 decoder pixels" in first or "2.0 decoder pixels" in first
    assert "25 % of the mask slots of a batch hold masks; the others cost as much" in second
    assert second.endswith(": a lower objective.masks_per_image makes steps faster")
    (record,) = caplog.records
    for field in ("image_size", "patch_size", 'data.jitter_unit="object"'):
        assert field in record.getMessage()


def test_windows_around_objects_raise_the_bound(capsys, caplog):
    windows = {"jitter": (0.5, 0.5), "jitter_unit": "object"}
    with caplog.at_level(logging.WARNING):
        print_mask_summary(MODEL, loader(squares(16, 1), 2, **windows))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("masks    objects are 16.0 decoder pixels long")
    assert second == (
        "slots    50 % of the mask slots of a batch hold masks; the others cost as much: a lower "
        "objective.masks_per_image makes steps faster"
    )
    assert not caplog.records


@pytest.mark.parametrize(("per_image", "slots", "images"), [(40, 40, 8), (2, 3, 64)])
def test_few_images_are_loaded(per_image, slots, images):
    batches = load_batches(loader(squares(9, per_image), slots))
    assert sum(len(batch.valid) for batch in batches) == images
    masks = choose_masks(batches)
    assert len(masks) == min(MAX_MASKS, images * per_image)
    assert all(mask.shape == (64, 64) and mask.any() for mask in masks)
    assert describe_slots(batches).endswith("as much") == (per_image < slots)
