"""Everything mode: what a record says, what is dropped, and that nothing compiles anew."""

import jax
import numpy as np
import pytest

import sam_jax
from sam_jax.data.sources.synthetic import SyntheticScenes
from sam_jax.everything import candidates, filtering, generator, rasterize, tiled_resize
from sam_jax.everything.filtering import float32_below
from sam_jax.everything.generator import SamAutomaticMaskGenerator, sa1b_preset
from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask, xyxy_to_xywh

LOOSE = dict(points_per_side=8, pred_iou_thresh=0.3, stability_score_thresh=0.5, box_nms_thresh=0.9)
IMAGE = SyntheticScenes((150, 200)).image(1)


@pytest.fixture(scope="module")
def make_generator():
    """A function of options -> a generator of the model that comes with the package."""
    model, variables = sam_jax.load("sam_tiny")
    return lambda **options: SamAutomaticMaskGenerator(model, variables, **LOOSE | options)


@pytest.fixture(scope="module")
def masks(make_generator):
    return make_generator().generate(IMAGE)


def test_records_say_what_their_masks_are(masks):
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


def test_masks_are_those_that_the_predictor_gives(make_generator, masks):
    predictor = sam_jax.SamPredictor(make_generator().model, make_generator().variables)
    predictor.set_image(IMAGE)
    for mask in masks[::7]:
        predicted, scores, _ = predictor.predict(np.array(mask["point_coords"]), np.array([1]))
        best = np.argmin(np.abs(scores - mask["predicted_iou"]))
        assert np.isclose(scores[best], mask["predicted_iou"], atol=1e-5)
        assert np.sum(predicted[best] != mask["segmentation"]) <= 1


def test_output_modes(make_generator, masks):
    strings = make_generator(output_mode="coco_rle").generate(IMAGE)
    lists = make_generator(output_mode="uncompressed_rle").generate(IMAGE)
    for mask, string, numbers in zip(masks, strings, lists, strict=True):
        assert string["segmentation"] == rle.encode(mask["segmentation"])
        assert numbers["segmentation"] == rle.uncompress(string["segmentation"])


def test_masks_do_not_depend_on_how_many_points_are_decoded_at_a_time(
    make_generator, masks, monkeypatch
):
    monkeypatch.setattr(generator, "CHUNK", 5)
    monkeypatch.setitem(candidates.UPSCALED, "cpu", 3)
    _assert_same(make_generator(points_per_batch=64).generate(IMAGE), masks)


def test_no_size_compiles_anew(make_generator):
    generate = make_generator(crop_n_layers=1, min_mask_region_area=20).generate
    generate(IMAGE)
    programs = (
        generator.encode_images,
        candidates.find_candidates,
        rasterize._decode,
        tiled_resize.pack,
    )
    before = [program._cache_size() for program in programs]
    for size in [(90, 60), (20, 333), (800, 500)]:
        generate(SyntheticScenes((800, 800)).image(0)[: size[0], : size[1]])
    assert [program._cache_size() for program in programs] == before


def test_the_device_of_the_variables_computes(make_generator, masks, monkeypatch):
    device, seen = jax.devices()[3], []

    def watch(module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            seen.extend(x.devices() for x in jax.tree.leaves(result))
            return result

        monkeypatch.setattr(module, name, call)

    watch(generator, "encode_images")
    watch(generator, "find_candidates")
    watch(filtering, "non_maximum_suppression")
    watch(rasterize, "pack")
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
    assert areas == sorted(areas)  # zoomed-in crops first
    every = {str((mask["crop_box"], mask["point_coords"], mask["bbox"])) for mask in every}
    for mask in kept:
        assert str((mask["crop_box"], mask["point_coords"], mask["bbox"])) in every


def test_masks_cut_by_a_crop_are_dropped(make_generator):
    """Within 20 pixels of a side of the crop that is not one of the image."""
    masks = make_generator(crop_n_layers=1).generate(IMAGE)
    assert any(mask["crop_box"] != [0, 0, 200, 150] for mask in masks)
    for mask in masks:
        x, y, width, height = mask["bbox"]
        crop_x, crop_y, crop_width, crop_height = mask["crop_box"]
        for side, of_crop, of_image in (
            (x, crop_x, 0),
            (y, crop_y, 0),
            (x + width, crop_x + crop_width, 200),
            (y + height, crop_y + crop_height, 150),
        ):
            assert abs(side - of_crop) > 20 or abs(side - of_image) <= 20


def test_masks_of_the_whole_image_are_dropped(make_generator, masks):
    areas = [mask["area"] for mask in make_generator(box_nms_thresh=1.0).generate(IMAGE)]
    limit = sorted(areas)[len(areas) // 2]
    share = limit / (150 * 200)
    left = make_generator(box_nms_thresh=1.0, max_image_share=share).generate(IMAGE)
    assert sorted(mask["area"] for mask in left) == sorted(area for area in areas if area < limit)


def test_small_masks_are_dropped(make_generator, masks):
    limit = sorted(mask["area"] for mask in masks)[len(masks) // 2]
    kept = make_generator(min_mask_region_area=limit).generate(IMAGE)
    left = make_generator(min_mask_region_area=limit, remove_small_masks=True).generate(IMAGE)
    assert min(mask["area"] for mask in kept) < limit
    assert left
    assert min(mask["area"] for mask in left) >= limit


def test_nothing_is_found(make_generator):
    assert make_generator(pred_iou_thresh=9.0).generate(IMAGE) == []
    nothing = make_generator(pred_iou_thresh=9.0, crop_n_layers=1, min_mask_region_area=9)
    assert nothing.generate(IMAGE) == []


def test_stability_is_that_of_two_levels(make_generator):
    predictor = sam_jax.SamPredictor(make_generator().model, make_generator().variables)
    predictor.set_image(IMAGE)
    for mask in make_generator(stability_score_offset=0.4).generate(IMAGE)[::7]:
        point = np.array(mask["point_coords"]), np.array([1])
        logits, scores, _ = predictor.predict(*point, return_logits=True)
        best = logits[np.argmin(np.abs(scores - mask["predicted_iou"]))]
        stability = np.sum(best > 0.4) / np.sum(best > -0.4)
        assert np.isclose(mask["stability_score"], stability, atol=1e-3)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.7, 0.88, 0.95, 1.0])
def test_a_float32_is_above_a_threshold_as_it_was_meant(threshold):
    rounded, step = float32_below(threshold), np.float32(np.inf)
    for value in (rounded, np.nextafter(rounded, step), np.nextafter(rounded, -step)):
        assert (value > rounded) == (float(value) > threshold)


def test_sa1b_preset(make_generator):
    """Twenty crops of an image: the whole paper's settings, with thresholds for a tiny model."""
    options = sa1b_preset() | LOOSE | dict(points_per_side=4)
    found = make_generator(**options).generate(IMAGE)
    assert {tuple(mask["crop_box"]) for mask in found} - {(0, 0, 200, 150)}
    assert all(100 <= mask["area"] < 0.95 * 150 * 200 for mask in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(points_per_side=None), "exactly one of points_per_side and point_grids"),
        (dict(point_grids=[np.ones((1, 2))]), "exactly one of points_per_side and point_grids"),
        (dict(points_per_side=0), r"points_per_side must leave a point .* got \[0\]"),
        (
            dict(crop_n_layers=2, crop_n_points_downscale_factor=4),
            r"points_per_side must leave a point .* got \[8, 2, 0\]",
        ),
        (dict(points_per_side=None, point_grids=[np.ones(2)]), r"'n 2' of \(x, y\); got \(2,\)"),
        (
            dict(points_per_side=None, point_grids=[np.full((1, 2), 3)]),
            r"must be in \[0, 1\]; got 3.0",
        ),
        (
            dict(points_per_side=None, point_grids=[np.ones((1, 2))], crop_n_layers=1),
            "a grid for the image and each of 1 layers of crops; got 1",
        ),
        (dict(output_mode="png"), "output_mode must be one of .*; got 'png'"),
        (dict(points_per_batch=0), "points_per_batch must be at least 1; got 0"),
        (dict(crop_n_layers=-1), "crop_n_layers must be at least 0; got -1"),
        (dict(min_mask_region_area=-1), "min_mask_region_area must be at least 0; got -1"),
        (dict(crop_overlap_ratio=1.5), "crop_overlap_ratio must be 0 to 1; got 1.5"),
        (dict(stability_score_offset=-1.0), "stability_score_offset must be at least 0"),
        (dict(max_image_share=0.0), "max_image_share must be above 0, up to 1; got 0.0"),
    ],
)
def test_bad_options(make_generator, options, message):
    with pytest.raises(ValueError, match=message):
        make_generator(**options)


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
def test_bad_images(make_generator, image, message):
    with pytest.raises(ValueError, match=message):
        make_generator(**LOOSE | dict(crop_n_layers=2)).generate(image)


def _assert_same(masks, expected):
    for mask, other in zip(masks, expected, strict=True):
        assert np.sum(mask["segmentation"] != other["segmentation"]) <= 1
        assert mask["point_coords"] == other["point_coords"]
        assert np.isclose(mask["predicted_iou"], other["predicted_iou"], atol=1e-5)
