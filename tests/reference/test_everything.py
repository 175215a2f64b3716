"""Compares the masks of everything mode and their order with segment-anything."""

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
ALL = dict(box_nms_thresh=1.0, crop_nms_thresh=1.0)  # no mask is dropped as a duplicate


@pytest.fixture(scope="module")
def random_pair(tiny_reference, tmp_path_factory):
    """Returns the reference model with random weights, and the same model in `sam_jax`."""
    return tiny_reference, _load(tiny_reference, tmp_path_factory)


@pytest.fixture(scope="module")
def trained_pair(build_tiny_reference, tmp_path_factory):
    """Returns the packaged trained model as a reference model, and in `sam_jax`.

    Its decoder has fewer heads than the default of the reference. The number of heads cannot be
    inferred from the weights, so that it is set here.
    """
    torch = pytest.importorskip("torch")
    model, variables = sam_jax.load("sam_tiny")
    reference = build_tiny_reference(
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
    for module in reference.mask_decoder.transformer.modules():
        if hasattr(module, "internal_dim"):
            module.num_heads = model.mask_decoder.num_heads
    path = tmp_path_factory.mktemp("trained") / "sam_tiny.pth"
    sam_jax.save(path, sam_jax.replace_fields(model, decoder_heads=8), variables)
    reference.load_state_dict(torch.load(path))
    return reference, (model, variables)


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT], ids=["landscape", "portrait"])
@pytest.mark.parametrize("options", [{}, CROPS, dict(min_mask_region_area=40)], ids=str)
def test_masks_of_random_weights_equal_the_reference(
    segment_anything, random_pair, photo, size, options
):
    """Checks masks that extend over the image and have almost equal boxes."""
    limits = dict(points_per_side=16, pred_iou_thresh=-1.0, stability_score_thresh=0.2)
    masks = _compare(segment_anything, random_pair, photo(size), limits | ALL | options)
    assert len(masks) > 100


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT], ids=["landscape", "portrait"])
@pytest.mark.parametrize("options", [{}, CROPS, CROPS | dict(min_mask_region_area=60)], ids=str)
def test_masks_of_trained_weights_equal_the_reference(
    segment_anything, trained_pair, size, options
):
    """Checks masks of objects, of which many are duplicates."""
    limits = dict(
        points_per_side=16,
        pred_iou_thresh=0.3,
        stability_score_thresh=0.5,
        box_nms_thresh=0.9,
        crop_nms_thresh=0.9,
    )
    image = SyntheticScenes(size).image(2)  # the model finds masks in each of its crops
    masks = _compare(segment_anything, trained_pair, image, limits | options)
    assert len(masks) > 50
    assert len({tuple(mask["crop_box"]) for mask in masks}) == (
        5 if "crop_n_layers" in options else 1
    )


@pytest.mark.parametrize("upright", [False, True], ids=["landscape", "portrait"])
def test_masks_of_a_photo_equal_the_reference(segment_anything, random_pair, upright):
    if not TRUCK.is_file():
        pytest.skip(f"no photo at {TRUCK}")
    image = read_image(TRUCK)
    image = np.ascontiguousarray(image.swapaxes(0, 1)) if upright else image
    limits = dict(points_per_side=7, pred_iou_thresh=-1.0, stability_score_thresh=0.2)
    masks = _compare(segment_anything, random_pair, image, limits | ALL)
    assert len(masks) > 30


def test_unequal_nms_thresholds(segment_anything, trained_pair):
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
    """Checks an image larger than the canvas, a custom point grid, and disabled thresholds."""
    image = SyntheticScenes((700, 1100)).image(2)
    _compare(segment_anything, trained_pair, image, dict(points_per_side=8))
    grid = np.random.default_rng(0).uniform(0, 1, (20, 2))
    options = dict(points_per_side=None, point_grids=[grid], box_nms_thresh=0.8)
    limits = dict(pred_iou_thresh=0.0, stability_score_thresh=0.0)
    assert len(_compare(segment_anything, trained_pair, image, options | limits)) > 20


def test_removed_small_regions_equal_the_reference():
    """Compares the removal of small regions with the reference, which uses OpenCV."""
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
            continue  # no island, or a tie for the largest, which OpenCV breaks differently
        actual, changed = remove_small_regions(mask, min_area)
        filled, holes_changed = amg.remove_small_regions(mask, min_area, mode="holes")
        expected, islands_changed = amg.remove_small_regions(filled, min_area, mode="islands")
        np.testing.assert_array_equal(actual, expected)
        assert changed == (holes_changed or islands_changed)


def _load(reference, tmp_path_factory):
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("random") / "sam.pth"
    torch.save(reference.state_dict(), path)
    return sam_jax.load(path)


def _compare(segment_anything, pair, image, options):
    """Returns the masks of an image after comparing them with the reference's."""
    reference, (model, variables) = pair
    options = options | dict(output_mode="uncompressed_rle")
    expected = segment_anything.SamAutomaticMaskGenerator(reference, **options).generate(image)
    actual = SamAutomaticMaskGenerator(model, variables, **options).generate(image)
    assert len(actual) == len(expected)
    for record, other in zip(actual, expected, strict=True):
        assert record.keys() == other.keys()
        assert record["point_coords"] == other["point_coords"]
        assert record["crop_box"] == other["crop_box"]
        assert abs(record["predicted_iou"] - other["predicted_iou"]) <= 1e-4
        _compare_masks(record, other)
    return actual


def _compare_masks(record, other):
    """Compares masks. Pixels may differ where rounding decides the sign of the logit."""
    mask, expected = rle.decode(record["segmentation"]), rle.decode(other["segmentation"])
    union = max(1, np.sum(mask | expected))
    assert np.sum(mask & expected) >= 0.999 * union - 1
    assert np.abs(np.subtract(record["bbox"], other["bbox"])).max() <= 1
    assert record["area"] == mask.sum()
    rounding = 1e-4 + 2 / union
    scores = record["stability_score"], other["stability_score"]
    assert np.isclose(*scores, 0, rounding, equal_nan=True)
