"""Tests that options of a generator can be set, and that it can be copied and pickled."""

import copy
import pickle

import jax
import numpy as np
import pytest

import sam_jax
from sam_jax.data.sources.synthetic import SyntheticScenes
from sam_jax.everything.generator import SamAutomaticMaskGenerator
from sam_jax.masks.boxes import box_of_mask

LOOSE = dict(points_per_side=8, pred_iou_thresh=0.3, stability_score_thresh=0.5, box_nms_thresh=0.9)
IMAGE = SyntheticScenes((150, 200)).image(1)


@pytest.fixture(scope="module")
def loaded():
    return sam_jax.load("sam_tiny")


@pytest.fixture
def generator(loaded):
    return SamAutomaticMaskGenerator(*loaded, **LOOSE)


def assert_equal(masks, expected):
    assert len(masks) == len(expected)
    for mask, other in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(mask.pop("segmentation"), other["segmentation"])
        assert mask == {name: other[name] for name in mask}


@pytest.mark.parametrize(
    "options",
    [
        dict(pred_iou_thresh=0.6),
        dict(stability_score_thresh=0.8, stability_score_offset=0.4),
        dict(box_nms_thresh=0.5, min_mask_region_area=30),
        dict(crop_n_layers=1, crop_nms_thresh=0.5, crop_n_points_downscale_factor=2),
        dict(tiles=100, crop_overlap_ratio=0.2),
        dict(max_image_share=0.1, remove_small_masks=True, output_mode="coco_rle"),
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_act_as_if_constructed_so(loaded, generator, options):
    before = generator.generate(IMAGE)
    for name, value in options.items():
        setattr(generator, name, value)
        assert getattr(generator, name) == getattr(generator.options, name) == value
    expected = SamAutomaticMaskGenerator(*loaded, **LOOSE | options).generate(IMAGE)
    assert_equal(generator.generate(IMAGE), expected)
    assert len(before) != len(expected) or "output_mode" in options


def test_grids_and_points_per_side_replace_each_other(loaded, generator):
    grid = np.random.default_rng(0).uniform(0, 1, (64, 2))
    generator.point_grids = [grid]
    assert generator.points_per_side is None
    options = LOOSE | dict(points_per_side=None, point_grids=[grid])
    expected = SamAutomaticMaskGenerator(*loaded, **options).generate(IMAGE)
    assert_equal(generator.generate(IMAGE), expected)
    with pytest.raises(ValueError, match="a grid for the image and each of 1 layers of crops"):
        generator.crop_n_layers = 1
    assert generator.crop_n_layers == 0
    generator.set_options(points_per_side=8, crop_n_layers=1, crop_n_points_downscale_factor=4)
    assert [len(grid) for grid in generator.point_grids] == [64, 4]


def test_grids_cannot_be_changed_in_place(generator):
    """A change in place would be lost when another option is set."""
    generator.point_grids = [np.full((4, 2), 0.5)]
    with pytest.raises(TypeError, match="does not support item assignment"):
        generator.point_grids[0] = np.full((2, 2), 0.5)
    with pytest.raises(ValueError, match="read-only"):
        generator.point_grids[0][0] = 0.1


def test_invalid_values_are_errors_and_change_nothing(generator):
    for name, value in (("points_per_batch", 0), ("output_mode", "png"), ("tiles", 3)):
        before = getattr(generator, name)
        with pytest.raises(ValueError, match=f"{name} must be"):
            setattr(generator, name, value)
        assert getattr(generator, name) == before
    for name in ("model", "variables", "predictor"):
        with pytest.raises(AttributeError, match=f"property '{name}' .* has no setter"):
            setattr(generator, name, None)
    with pytest.raises(TypeError, match="pred_iou"):
        generator.set_options(pred_iou=0.5)


def test_default_tiles_can_be_set(loaded, generator):
    generator.tiles = "none"
    assert generator.tiles is None
    windows = SamAutomaticMaskGenerator(
        sam_jax.replace_fields(loaded[0], object_share=(0.25, 0.75)), loaded[1], tiles="none"
    )
    windows.pred_iou_thresh = 0.1
    assert windows.tiles is None
    windows.tiles = None
    assert windows.tiles == "auto"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_are_equal(generator, duplicate):
    generator.stability_score_thresh = 0.7
    same = duplicate(generator)
    assert_equal(same.generate(IMAGE), generator.generate(IMAGE))
    same.pred_iou_thresh = 0.9
    assert generator.pred_iou_thresh == 0.3


def test_a_copy_stays_on_its_device(loaded):
    device = jax.devices()[3]
    model, variables = loaded
    there = SamAutomaticMaskGenerator(model.bind(jax.device_put(variables, device)))
    assert there.predictor.device == copy.deepcopy(there).predictor.device == device


def test_the_predictor_has_the_same_model(generator):
    predictor = generator.predictor
    assert predictor.model is generator.model
    predictor.set_image(IMAGE)
    mask = generator.generate(IMAGE)[0]
    predicted, scores, _ = predictor.predict(np.array(mask["point_coords"]), np.array([1]))
    best = predicted[np.argmin(np.abs(scores - mask["predicted_iou"]))]
    assert np.abs(box_of_mask(best) - box_of_mask(mask["segmentation"])).max() <= 1


def test_best_scores_are_those_without_thresholds(loaded, generator):
    options = dict(pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0)
    masks = SamAutomaticMaskGenerator(*loaded, points_per_side=8, **options).generate(IMAGE)
    generator.pred_iou_thresh = 9.0
    generator.max_image_share = 0.01
    best = generator.best_scores(IMAGE)
    for name in ("predicted_iou", "stability_score"):
        assert getattr(best, name) == np.nanmax([mask[name] for mask in masks])
    generator.pred_iou_thresh = best.predicted_iou
    assert generator.generate(IMAGE) == []
