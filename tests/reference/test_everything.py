"""Everything mode against segment-anything's: the same masks, in the same order."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

import sam_jax
from sam_jax.data.sources.synthetic import SyntheticScenes
from sam_jax.everything.generator import SamAutomaticMaskGenerator
from sam_jax.images.read import read_image
from sam_jax.masks import rle
from sam_jax.masks.regions import remove_small_regions

pytestmark = pytest.mark.reference

TRUCK = Path(__file__).parents[3] / "shared" / "realdata" / "sam_images" / "truck.jpg"
LANDSCAPE, PORTRAIT = (180, 270), (290, 190)
CROPS = dict(crop_n_layers=1, crop_n_points_downscale_factor=2)
ALL = dict(box_nms_thresh=1.0, crop_nms_thresh=1.0)  # nothing is a duplicate


@pytest.fixture(scope="module")
def random_pair(tiny_reference, tmp_path_factory):
    """The reference with random weights, and ours."""
    return tiny_reference, _load(tiny_reference, tmp_path_factory)


@pytest.fixture(scope="module")
def trained_pair(build_tiny_reference, tmp_path_factory):
    """The trained model that comes with the package, as a model of the reference, and ours.

    Its decoder has fewer heads than the reference has by default, which no weight tells.
    """
    torch = pytest.importorskip("torch")
    model, variables = sam_jax.load("sam_tiny")
    theirs = build_tiny_reference(
        embed_dim=model.image_encoder.embed_dim,
        depth=model.image_encoder.depth,
        num_heads=model.image_encoder.num_heads,
        global_blocks=model.image_encoder.global_blocks,
        window_size=model.image_encoder.window_size,
        prompt_dim=model.embedding_dim,
        mask_channels=model.prompt_encoder.mask_channels,
        decoder_mlp_dim=model.mask_decoder.mlp_dim,
        iou_hidden_dim=model.mask_decoder.iou_hidden_dim,
    )
    for module in theirs.mask_decoder.transformer.modules():
        if hasattr(module, "internal_dim"):
            module.num_heads = model.mask_decoder.num_heads
    path = tmp_path_factory.mktemp("trained") / "sam_tiny.pth"
    sam_jax.save(path, sam_jax.replace_fields(model, decoder_heads=8), variables)
    theirs.load_state_dict(torch.load(path))
    return theirs, (model, variables)


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT], ids=["landscape", "portrait"])
@pytest.mark.parametrize("options", [{}, CROPS, dict(min_mask_region_area=40)], ids=str)
def test_random_weights(segment_anything, random_pair, photo, size, options):
    """Masks all over the image, whose boxes hardly differ."""
    limits = dict(points_per_side=16, pred_iou_thresh=-1.0, stability_score_thresh=0.2)
    masks = _compare(segment_anything, random_pair, photo(size), limits | ALL | options)
    assert len(masks) > 100


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT], ids=["landscape", "portrait"])
@pytest.mark.parametrize("options", [{}, CROPS, CROPS | dict(min_mask_region_area=60)], ids=str)
def test_trained_weights(segment_anything, trained_pair, size, options):
    """Masks of objects, many of them duplicates."""
    limits = dict(
        points_per_side=16,
        pred_iou_thresh=0.3,
        stability_score_thresh=0.5,
        box_nms_thresh=0.9,
        crop_nms_thresh=0.9,
    )
    image = SyntheticScenes(size).image(1)
    masks = _compare(segment_anything, trained_pair, image, limits | options)
    assert len(masks) > 50
    assert len({tuple(mask["crop_box"]) for mask in masks}) == (
        5 if "crop_n_layers" in options else 1
    )


@pytest.mark.parametrize("upright", [False, True], ids=["landscape", "portrait"])
def test_real_photo(segment_anything, random_pair, upright):
    if not TRUCK.is_file():
        pytest.skip(f"no photo at {TRUCK}")
    image = read_image(TRUCK)
    image = np.ascontiguousarray(image.swapaxes(0, 1)) if upright else image
    limits = dict(points_per_side=7, pred_iou_thresh=-1.0, stability_score_thresh=0.2)
    masks = _compare(segment_anything, random_pair, image, limits | ALL)
    assert len(masks) > 30


def test_unequal_thresholds(segment_anything, trained_pair):
    options = CROPS | dict(
        points_per_side=16,
        pred_iou_thresh=0.3,
        stability_score_thresh=0.5,
        stability_score_offset=0.5,
        box_nms_thresh=0.9,
        crop_nms_thresh=0.7,
        crop_overlap_ratio=0.2,
        min_mask_region_area=60,
    )
    _compare(segment_anything, trained_pair, SyntheticScenes(LANDSCAPE).image(1), options)
    options |= dict(box_nms_thresh=0.7, crop_nms_thresh=0.9)
    _compare(segment_anything, trained_pair, SyntheticScenes(LANDSCAPE).image(1), options)


def test_default_thresholds(segment_anything, trained_pair):
    """On an image that is larger than any frame, with point_grids and without limits too."""
    image = SyntheticScenes((700, 1100)).image(2)
    _compare(segment_anything, trained_pair, image, dict(points_per_side=8))
    grid = np.random.default_rng(0).uniform(0, 1, (20, 2))
    options = dict(points_per_side=None, point_grids=[grid], box_nms_thresh=0.8)
    limits = dict(pred_iou_thresh=0.0, stability_score_thresh=0.0)
    assert len(_compare(segment_anything, trained_pair, image, options | limits)) > 20


def test_small_regions():
    """Against OpenCV, on blots of all sizes."""
    pytest.importorskip("cv2")
    amg = pytest.importorskip("segment_anything.utils.amg")
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = rng.integers(3, 60, 2)
        mask = rng.random(size) < rng.choice([0.1, 0.4, 0.6, 0.9])
        mask[:, : rng.integers(0, 40)] = False
        min_area = int(rng.integers(1, 60))
        areas = np.sort(np.bincount(ndimage.label(mask, np.ones((3, 3)))[0].ravel())[1:])
        if not len(areas) or (len(areas) > 1 and areas[-1] == areas[-2] < min_area):
            continue  # nothing, or parts that are equally large: see `regions`
        ours, changed = remove_small_regions(mask, min_area)
        filled, by_holes = amg.remove_small_regions(mask, min_area, mode="holes")
        theirs, by_islands = amg.remove_small_regions(filled, min_area, mode="islands")
        np.testing.assert_array_equal(ours, theirs)
        assert changed == (by_holes or by_islands)


def _load(reference, tmp_path_factory):
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("random") / "sam.pth"
    torch.save(reference.state_dict(), path)
    return sam_jax.load(path)


def _compare(segment_anything, pair, image, options):
    """Our masks of an image, once they are seen to equal the reference's."""
    theirs, (model, variables) = pair
    options = options | dict(output_mode="uncompressed_rle")
    theirs = segment_anything.SamAutomaticMaskGenerator(theirs, **options).generate(image)
    ours = SamAutomaticMaskGenerator(model, variables, **options).generate(image)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert one["point_coords"] == other["point_coords"]
        assert one["crop_box"] == other["crop_box"]
        assert abs(one["predicted_iou"] - other["predicted_iou"]) <= 1e-4
        _compare_masks(one, other)
    return ours


def _compare_masks(one, other):
    """A pixel whose logit is a level but for rounding may be on either side of it."""
    mask, expected = rle.decode(one["segmentation"]), rle.decode(other["segmentation"])
    union = max(1, np.sum(mask | expected))
    assert np.sum(mask & expected) >= 0.999 * union - 1
    assert np.abs(np.subtract(one["bbox"], other["bbox"])).max() <= 1
    assert one["area"] == mask.sum()
    rounding = 1e-4 + 2 / union
    assert np.isclose(one["stability_score"], other["stability_score"], 0, rounding, equal_nan=True)
