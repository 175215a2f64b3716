"""Runs programs that were written for segment-anything with both packages, and odd prompts."""

import importlib

import numpy as np
import pytest

import sam_jax
from sam_jax import segment_anything as ours
from sam_jax.masks import rle
from sam_jax.masks.overlap import mask_iou

pytestmark = pytest.mark.reference

SIZE = (120, 90)
TOLERANCE = 1e-4  # of the largest magnitude
POINTS = np.array([[30.0, 40.0], [60.0, 20.0], [11.0, 100.0]])
PROMPTS = {
    "no points": dict(point_coords=np.zeros((0, 2)), point_labels=np.zeros(0)),
    "no points and a box": dict(
        point_coords=np.zeros((0, 2)), point_labels=np.zeros(0), box=np.array([5, 6, 70, 80])
    ),
    "label -1": dict(point_coords=POINTS, point_labels=np.array([1, -1, 0])),
    "only label -1": dict(point_coords=POINTS[:1], point_labels=np.array([-1])),
    "labels 2 and 3": dict(point_coords=POINTS, point_labels=np.array([2, 3, 1])),
    "only label 2": dict(point_coords=POINTS[:1], point_labels=np.array([2])),
    "label 3 and a box": dict(
        point_coords=POINTS[:1], point_labels=np.array([3]), box=np.array([5, 6, 70, 80])
    ),
    "reversed box": dict(box=np.array([70, 80, 5, 6])),
    "box without area": dict(box=np.array([30, 40, 30, 40])),
    "box without height": dict(box=np.array([10, 40, 60, 40])),
    "outside": dict(
        point_coords=np.array([[-20.0, 500.0]]), point_labels=[1], box=np.array([-9, -8, 200, 300])
    ),
}


@pytest.fixture(scope="module")
def models(tiny_reference, tmp_path_factory):
    """Returns the reference model with random weights, and the same model bound to its weights."""
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("random") / "sam.pth"
    torch.save(tiny_reference.state_dict(), path)
    model, variables = sam_jax.load(path)
    return tiny_reference, model.bind(variables)


@pytest.mark.parametrize("name", PROMPTS)
def test_odd_prompts_give_the_official_masks(segment_anything, models, photo, name, difference):
    logits = []
    for package, model in zip((segment_anything, ours), models, strict=True):
        predictor = package.SamPredictor(model)
        predictor.set_image(photo(SIZE))
        logits.append(predictor.predict(**PROMPTS[name], return_logits=True))
    for expected, actual in zip(*logits, strict=True):
        assert difference(actual, expected) < TOLERANCE


def predictor_program(package, sam, image):
    """Saves an embedding, predicts with another predictor that gets it, and refines the result."""
    predictor = package.SamPredictor(sam)
    predictor.set_image(image)
    results = {
        "image": predictor.transform.apply_image(image),
        "coords": predictor.transform.apply_coords(POINTS, image.shape[:2]),
        "boxes": predictor.transform.apply_boxes(np.array([[3, 4, 50, 60]]), (120, 90)),
        "longest side": package.ResizeLongestSide(48).apply_image(image),
        "target length": predictor.transform.target_length,
        "features": predictor.features,
    }
    saved = predictor.features, predictor.original_size, predictor.input_size
    predictor.reset_image()
    assert not predictor.is_image_set
    assert predictor.features is None

    other = package.SamPredictor(sam)
    other.features, other.original_size, other.input_size = saved
    other.is_image_set = True
    assert (other.model.mask_threshold, other.model.image_format) == (0.0, "RGB")
    masks, scores, low_res = other.predict(POINTS[:1], np.array([1]), return_logits=True)
    best = low_res[[np.argmax(scores)]]
    refined = other.predict(POINTS, [1, 0, 1], mask_input=best, multimask_output=False)
    results |= {"masks": masks, "scores": scores, "low_res": low_res, "refined": refined[2]}
    return {name: np.asarray(value) for name, value in results.items()}


def test_a_program_with_a_predictor(segment_anything, models, photo, difference):
    transforms = importlib.import_module("segment_anything.utils.transforms")
    segment_anything.ResizeLongestSide = transforms.ResizeLongestSide
    expected = predictor_program(segment_anything, models[0], photo(SIZE))
    actual = predictor_program(ours, models[1], photo(SIZE))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert difference(actual[name], value) < TOLERANCE, name


def generator_program(package, sam, image):
    """Sets thresholds after construction, as many programs do."""
    generator = package.SamAutomaticMaskGenerator(
        sam, points_per_side=16, output_mode="uncompressed_rle"
    )
    generator.pred_iou_thresh = -1.0
    generator.stability_score_thresh = 0.3
    generator.stability_score_offset = 0.5
    generator.box_nms_thresh = 1.0
    generator.min_mask_region_area = 20
    generator.points_per_batch = 32
    assert generator.predictor.model.mask_threshold == 0.0
    assert generator.predictor.transform.target_length == 64
    return generator.generate(image)


def test_a_program_with_a_generator(segment_anything, models, photo):
    expected = generator_program(segment_anything, models[0], photo(SIZE))
    actual = generator_program(ours, models[1], photo(SIZE))
    assert len(actual) == len(expected) > 20
    for mask, other in zip(actual, expected, strict=True):
        assert mask["point_coords"] == other["point_coords"]
        assert np.isclose(mask["stability_score"], other["stability_score"], atol=1e-2)
        pixels = (rle.decode(record["segmentation"]) for record in (mask, other))
        assert mask_iou(*pixels) > 0.999


def test_methods_of_the_model(models, photo, difference):
    torch = pytest.importorskip("torch")
    reference, model = models
    image = np.moveaxis(photo((64, 48)), -1, 0).astype(np.float32)
    expected = reference.preprocess(torch.tensor(image)[None])
    assert difference(model.preprocess(image[None]), expected) < 1e-6
    low_res = np.random.default_rng(0).normal(0, 6, (2, 3, 32, 32)).astype(np.float32)
    expected = reference.postprocess_masks(torch.tensor(low_res), (64, 48), SIZE)
    assert difference(model.postprocess_masks(low_res, (64, 48), SIZE), expected) < 1e-5


def test_functions_of_amg(segment_anything):
    torch = pytest.importorskip("torch")
    amg = importlib.import_module("segment_anything.utils.amg")
    rng = np.random.default_rng(0)
    masks = rng.random((7, 20, 30)) < rng.random((7, 1, 1))
    masks[0] = False
    tensors = torch.tensor(masks)
    runs = ours.mask_to_rle_pytorch(masks)
    assert runs == amg.mask_to_rle_pytorch(tensors)
    boxes = ours.batched_mask_to_box(masks)
    np.testing.assert_array_equal(boxes, amg.batched_mask_to_box(tensors))
    logits = rng.normal(0, 2, (7, 20, 30)).astype(np.float32)
    score = amg.calculate_stability_score(torch.tensor(logits), 0.0, 1.0)
    np.testing.assert_allclose(ours.calculate_stability_score(logits, 0.0, 1.0), score, 1e-6)
    for mask, run, box in zip(masks, runs, boxes, strict=True):
        np.testing.assert_array_equal(ours.rle_to_mask(run), amg.rle_to_mask(run))
        assert ours.area_from_rle(run) == amg.area_from_rle(run)
        xywh = amg.box_xyxy_to_xywh(torch.tensor(box))
        np.testing.assert_array_equal(ours.box_xyxy_to_xywh(box), xywh)
        assert rle.uncompress(ours.coco_encode_rle(run)) == run
        for mode in ("holes", "islands"):
            pytest.importorskip("cv2")
            actual, expected = (
                package.remove_small_regions(mask, 5, mode) for package in (ours, amg)
            )
            np.testing.assert_array_equal(actual[0], expected[0])
            assert actual[1] == expected[1]
    assert ours.generate_crop_boxes((70, 99), 2, 0.34) == amg.generate_crop_boxes((70, 99), 2, 0.34)
    np.testing.assert_array_equal(ours.build_point_grid(5), amg.build_point_grid(5))
    grids = ours.build_all_layer_point_grids(8, 2, 2), amg.build_all_layer_point_grids(8, 2, 2)
    for actual, expected in zip(*grids, strict=True):
        np.testing.assert_array_equal(actual, expected)
