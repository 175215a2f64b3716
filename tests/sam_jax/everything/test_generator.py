"""Tests everything mode: its records, dropped masks, and that image sizes need no compilation.

These tests also cover `candidates.py`, `rasterize.py` and `records.py`.
"""

import dataclasses
import doctest

import jax
import numpy as np
import pytest

import sam_jax
from sam_jax.data.sources.synthetic import SyntheticScenes
from sam_jax.everything import candidates, filtering, generator, rasterize, tiled_resize
from sam_jax.everything.generator import SamAutomaticMaskGenerator
from sam_jax.everything.options import sa1b_preset
from sam_jax.everything.tuning import TUNINGS
from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask, xyxy_to_xywh
from sam_jax.predict import encode

LOOSE = dict(points_per_side=8, pred_iou_thresh=0.3, stability_score_thresh=0.5, box_nms_thresh=0.9)
IMAGE = SyntheticScenes((150, 200)).image(1)


@pytest.fixture(scope="module")
def make_generator():
    """Returns a function that makes a generator with the packaged model."""
    model, variables = sam_jax.load("sam_tiny")
    return lambda **options: SamAutomaticMaskGenerator(model, variables, **LOOSE | options)


@pytest.fixture(scope="module")
def masks(make_generator):
    return make_generator().generate(IMAGE)


def test_records_describe_their_masks(masks):
    assert len(masks) > 10
    for mask in masks:
        pixels = mask["segmentation"]
        assert pixels.shape == IMAGE.shape[:2]
        assert pixels.dtype == bool
        assert mask["area"] == pixels.sum()
        assert mask["bbox"] == xyxy_to_xywh(box_of_mask(pixels)).tolist()
        assert mask["crop_box"] == [0, 0, 200, 150]
        assert mask["predicted_iou"] > LOOSE["pred_iou_thresh"]
        assert mask["stability_score"] >= LOOSE["stability_score_thresh"]
        ((x, y),) = mask["point_coords"]
        assert (x * 8 / 200) % 1 == (y * 8 / 150) % 1 == 0.5
    iou = [mask["predicted_iou"] for mask in masks]
    assert iou == sorted(iou, reverse=True)


def test_masks_are_those_of_the_predictor(make_generator, masks):
    predictor = sam_jax.SamPredictor(make_generator().model, make_generator().variables)
    predictor.set_image(IMAGE)
    for mask in masks[::7]:
        predicted, scores, _ = predictor.predict(np.array(mask["point_coords"]), np.array([1]))
        best = np.argmin(np.abs(scores - mask["predicted_iou"]))
        assert np.isclose(scores[best], mask["predicted_iou"], atol=1e-5)
        assert np.sum(predicted[best] != mask["segmentation"]) <= 1


def test_output_modes_hold_the_same_masks(make_generator, masks):
    strings = make_generator(output_mode="coco_rle").generate(IMAGE)
    lists = make_generator(output_mode="uncompressed_rle").generate(IMAGE)
    for mask, string, numbers in zip(masks, strings, lists, strict=True):
        assert string["segmentation"] == rle.encode(mask["segmentation"])
        assert numbers["segmentation"] == rle.uncompress(string["segmentation"])


def test_masks_do_not_depend_on_batch_sizes(make_generator, masks, monkeypatch):
    tuning = dataclasses.replace(TUNINGS["cpu"], max_points_per_batch=5, prompts_per_upscaling=3)
    monkeypatch.setitem(TUNINGS, "cpu", tuning)
    found = make_generator(points_per_batch=64).generate(IMAGE)
    for mask, other in zip(found, masks, strict=True):
        assert np.sum(mask["segmentation"] != other["segmentation"]) <= 1
        assert mask["point_coords"] == other["point_coords"]
        assert np.isclose(mask["predicted_iou"], other["predicted_iou"], atol=1e-5)


def test_new_image_sizes_compile_no_program(make_generator):
    generate = make_generator(crop_n_layers=1, min_mask_region_area=20).generate
    generate(IMAGE)
    programs = (
        encode.encode_images,
        candidates.find_candidates,
        rasterize._decode_points,
        tiled_resize.pack_tiles,
    )
    before = [program._cache_size() for program in programs]
    for size in [(90, 60), (20, 333), (800, 500)]:
        generate(SyntheticScenes((800, 800)).image(0)[: size[0], : size[1]])
    assert [program._cache_size() for program in programs] == before


def test_programs_run_on_the_device_of_the_variables(make_generator, masks, monkeypatch):
    device, seen = jax.devices()[3], []

    def watch(module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            seen.extend(x.devices() for x in jax.tree.leaves(result))
            return result

        monkeypatch.setattr(module, name, call)

    watch(encode, "encode_images")
    watch(generator, "find_candidates")
    watch(filtering, "non_maximum_suppression")
    watch(rasterize, "pack_tiles")
    variables = jax.device_put(make_generator().variables, device)
    there = SamAutomaticMaskGenerator(make_generator().model, variables, **LOOSE, crop_n_layers=1)
    there.generate(IMAGE)
    assert len(seen) > 10
    assert all(devices == {device} for devices in seen)


def test_duplicates_are_dropped_across_crops(make_generator):
    crops = dict(crop_n_layers=1, crop_n_points_downscale_factor=2)
    kept = make_generator(**crops, crop_nms_thresh=0.5).generate(IMAGE)
    every = make_generator(**crops, crop_nms_thresh=1.0).generate(IMAGE)
    assert len(kept) < len(every)
    areas = [mask["crop_box"][2] * mask["crop_box"][3] for mask in kept]
    assert areas == sorted(areas)  # smaller crops come first
    every = {str((mask["crop_box"], mask["point_coords"], mask["bbox"])) for mask in every}
    for mask in kept:
        assert str((mask["crop_box"], mask["point_coords"], mask["bbox"])) in every


def test_masks_cut_by_a_crop_are_dropped(make_generator):
    """Checks masks within 20 pixels of a side of the crop that is not a side of the image."""
    masks = make_generator(crop_n_layers=1).generate(IMAGE)
    assert any(mask["crop_box"] != [0, 0, 200, 150] for mask in masks)
    for mask in masks:
        x, y, width, height = mask["bbox"]
        crop_x, crop_y, crop_width, crop_height = mask["crop_box"]
        for side, crop_side, image_side in (
            (x, crop_x, 0),
            (y, crop_y, 0),
            (x + width, crop_x + crop_width, 200),
            (y + height, crop_y + crop_height, 150),
        ):
            assert abs(side - crop_side) > 20 or abs(side - image_side) <= 20


def test_tiles_are_further_crops(make_generator):
    masks = make_generator(tiles=100).generate(IMAGE)
    crops = {tuple(mask["crop_box"]) for mask in masks}
    assert [0, 0, 200, 150] in map(list, crops)
    assert len(crops) > 2
    for x, y, width, height in crops - {(0, 0, 200, 150)}:
        assert (width, height) == (100, 100)
        assert x + 100 <= 200
        assert y + 100 <= 150
    for mask in masks:
        assert mask["segmentation"].shape == (150, 200)
        assert mask["area"] == mask["segmentation"].sum()
    sides = [mask["crop_box"][2] for mask in masks]
    assert sides == sorted(sides)  # zoomed-in tiles first


def test_one_tile_equals_no_tiles(make_generator, masks):
    for tiles in (200, 1000):
        found = make_generator(tiles=tiles).generate(IMAGE)
        for mask, other in zip(found, masks, strict=True):
            assert np.array_equal(mask["segmentation"], other["segmentation"])
            assert mask["predicted_iou"] == other["predicted_iou"]
            assert mask["stability_score"] == other["stability_score"]


def test_masks_of_a_large_share_of_the_image_are_dropped(make_generator):
    areas = [mask["area"] for mask in make_generator(box_nms_thresh=1.0).generate(IMAGE)]
    limit = sorted(areas)[len(areas) // 2]
    share = limit / (150 * 200)
    remaining = make_generator(box_nms_thresh=1.0, max_image_share=share).generate(IMAGE)
    expected = sorted(area for area in areas if area < limit)
    assert sorted(mask["area"] for mask in remaining) == expected


def test_small_masks_are_dropped(make_generator, masks):
    limit = sorted(mask["area"] for mask in masks)[len(masks) // 2]
    kept = make_generator(min_mask_region_area=limit).generate(IMAGE)
    large = make_generator(min_mask_region_area=limit, remove_small_masks=True).generate(IMAGE)
    assert min(mask["area"] for mask in kept) < limit
    assert large
    assert min(mask["area"] for mask in large) >= limit


def test_an_image_may_have_no_masks(make_generator):
    assert make_generator(pred_iou_thresh=9.0).generate(IMAGE) == []
    strict = make_generator(pred_iou_thresh=9.0, crop_n_layers=1, min_mask_region_area=9)
    assert strict.generate(IMAGE) == []


def test_stability_compares_two_levels(make_generator):
    predictor = sam_jax.SamPredictor(make_generator().model, make_generator().variables)
    predictor.set_image(IMAGE)
    for mask in make_generator(stability_score_offset=0.4).generate(IMAGE)[::7]:
        point = np.array(mask["point_coords"]), np.array([1])
        logits, scores, _ = predictor.predict(*point, return_logits=True)
        best = logits[np.argmin(np.abs(scores - mask["predicted_iou"]))]
        stability = np.sum(best > 0.4) / np.sum(best > -0.4)
        assert np.isclose(mask["stability_score"], stability, atol=1e-3)


def test_the_options_of_sa1b(make_generator):
    """Uses the settings of the paper with 20 crops, and thresholds for the tiny model."""
    model, variables = make_generator().model, make_generator().variables
    options = LOOSE | dict(points_per_side=4)
    preset = SamAutomaticMaskGenerator.sa1b(model, variables, **options)
    for name, value in (sa1b_preset() | options).items():
        assert getattr(preset.options, name) == value
    found = preset.generate(IMAGE)
    assert {tuple(mask["crop_box"]) for mask in found} - {(0, 0, 200, 150)}
    assert all(100 <= mask["area"] < 0.95 * 150 * 200 for mask in found)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), "image must have shape"),
        (np.zeros((4, 4, 3)), "image must be a numpy array of uint8"),
        (np.zeros((1, 20_000, 3), np.uint8), "sides of at most 16256 pixels"),
        (np.broadcast_to(np.uint8(0), (9000, 8000, 3)), "and at most 67108864 in all; got"),
        (np.zeros((1, 1, 3), np.uint8), "image must be large enough for 2 layers of crops"),
    ],
)
def test_invalid_images_are_errors(make_generator, image, message):
    with pytest.raises(ValueError, match=message):
        make_generator(crop_n_layers=2).generate(image)


def test_the_example_runs():
    example = doctest.DocTestFinder(recurse=False).find(
        SamAutomaticMaskGenerator, globs={"sam_jax": sam_jax, "np": np}
    )
    results = [doctest.DocTestRunner().run(test) for test in example]
    assert [result.failed for result in results] == [0]
    assert results[0].attempted > 2
