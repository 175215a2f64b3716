"""Tests that options are validated, have the defaults of the constructor, and give thresholds."""

import dataclasses
import inspect

import numpy as np
import pytest

from sam_jax.everything.generator import SamAutomaticMaskGenerator
from sam_jax.everything.options import GeneratorOptions, sa1b_preset
from sam_jax.model.sam import replace_fields


def test_options_are_the_arguments_of_the_generator():
    parameters = list(inspect.signature(SamAutomaticMaskGenerator).parameters.values())[2:]
    fields = dataclasses.fields(GeneratorOptions)
    assert [(x.name, x.default) for x in parameters] == [(x.name, x.default) for x in fields]


def test_default_tiles_depend_on_the_model(tiny):
    model = replace_fields(tiny[0], object_share=(0.25, 0.75))
    for options, expected in (({}, "auto"), ({"tiles": "none"}, None), ({"tiles": 64}, 64)):
        assert SamAutomaticMaskGenerator(model, tiny[1], **options).options.tiles == expected
    assert SamAutomaticMaskGenerator(*tiny).options.tiles is None
    assert SamAutomaticMaskGenerator.sa1b(model, tiny[1]).options.tiles == "auto"


def test_thresholds():
    thresholds = GeneratorOptions(max_image_share=0.5).make_thresholds((30, 40))
    assert thresholds.iou == np.float32(0.88)
    assert thresholds.stability == np.float32(0.95)
    assert thresholds.offset == 1
    assert thresholds.area == 600
    assert float(thresholds.box_iou) <= 0.7


def test_thresholds_of_zero_and_less_are_disabled():
    options = GeneratorOptions(pred_iou_thresh=0.0, stability_score_thresh=-1.0)
    thresholds = options.make_thresholds((30, 40))
    assert thresholds.iou == thresholds.stability == -np.inf
    assert thresholds.area == np.inf


def test_sa1b_has_grids_for_two_layers_of_crops():
    grids = GeneratorOptions(**sa1b_preset()).make_point_grids()
    assert [len(grid) for grid in grids] == [32**2, 16**2, 8**2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(points_per_side=None), "exactly one of points_per_side and point_grids"),
        (dict(point_grids=[np.ones((1, 2))]), "exactly one of points_per_side and point_grids"),
        (dict(points_per_side=0), r"points_per_side must leave a point .* got \[0\]"),
        (
            dict(points_per_side=8, crop_n_layers=2, crop_n_points_downscale_factor=4),
            r"points_per_side must leave a point .* got \[8, 2, 0\]",
        ),
        (dict(points_per_side=None, point_grids=[np.ones(2)]), r"'n 2' of \(x, y\); got \(2,\)"),
        (
            dict(points_per_side=None, point_grids=[np.full((1, 2), 3)]),
            r"must be in \[0, 1\]; got 3.0",
        ),
        (dict(tiles=7), "tiles must be None, .auto., .none., or the side of a tile in pixels"),
        (
            dict(points_per_side=None, point_grids=[np.ones((1, 2))], crop_n_layers=1),
            "a grid for the image and each of 1 layers of crops; got 1",
        ),
        (dict(output_mode="png"), "output_mode must be one of .*; got 'png'"),
        (dict(points_per_batch=0), "points_per_batch must be at least 1; got 0"),
        (dict(crop_n_layers=-1), "crop_n_layers must be at least 0; got -1"),
        (dict(crop_n_points_downscale_factor=0), "downscale_factor must be at least 1; got 0"),
        (dict(min_mask_region_area=-1), "min_mask_region_area must be at least 0; got -1"),
        (dict(crop_overlap_ratio=1.5), "crop_overlap_ratio must be 0 to 1; got 1.5"),
        (dict(stability_score_offset=-1.0), "stability_score_offset must be at least 0"),
        (dict(max_image_share=0.0), "max_image_share must be above 0, up to 1; got 0.0"),
        (dict(pred_iou_thresh=np.nan), "pred_iou_thresh must be a number; got nan"),
        (dict(box_nms_thresh=np.nan), "box_nms_thresh must be a number; got nan"),
        (dict(points_per_side=None, point_grids=[["a"]]), "point_grids must be arrays 'n 2'"),
    ],
)
def test_invalid_options_are_errors(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        SamAutomaticMaskGenerator(*tiny, **options)
    with pytest.raises(ValueError, match=message):
        GeneratorOptions(**options).make_point_grids()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(points_per_side=2.5), "points_per_side must be an integer; got 2.5"),
        (dict(crop_n_layers=1.0), "crop_n_layers must be an integer; got 1.0"),
        (dict(points_per_batch="64"), "points_per_batch must be an integer; got '64'"),
        (dict(stability_score_offset="1"), "stability_score_offset must be a number; got '1'"),
    ],
)
def test_options_of_wrong_types_are_errors(options, message):
    """Avoids the constructor, whose types the tests check and users do not."""
    made = GeneratorOptions()
    for name, value in options.items():
        object.__setattr__(made, name, value)
    with pytest.raises(ValueError, match=message):
        made.__post_init__()
