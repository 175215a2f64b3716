"""Tests the names of segment-anything's predictor, and saved embeddings."""

import copy
import pickle

import jax
import numpy as np
import pytest

import sam_jax
from sam_jax.images.resize import postprocess_masks, resize_and_pad
from sam_jax.predict.official_names import ResizeLongestSide

CLICK = dict(point_coords=np.array([[30.0, 20.0]]), point_labels=np.array([1]))
SIZE, INPUT_SIZE = (60, 70), (48, 56)


def photo(size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture
def predictor(tiny):
    return sam_jax.SamPredictor(*tiny)


def assert_equal(prediction, expected):
    for a, b in zip(prediction, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_transform_is_that_of_the_predictor(predictor):
    transform = predictor.transform
    resized, size = resize_and_pad(photo(), (48, 72))
    assert size == INPUT_SIZE
    np.testing.assert_array_equal(transform.apply_image(photo()), resized[:48, :56])
    np.testing.assert_allclose(transform.apply_coords(np.array([[35, 30]]), SIZE), [[28, 24]])
    boxes = transform.apply_boxes(np.array([[0, 0, 35, 30], [35, 30, 70, 60]]), SIZE)
    np.testing.assert_allclose(boxes, [[0, 0, 28, 24], [28, 24, 56, 48]])
    assert ResizeLongestSide(64).apply_image(photo()).shape == (55, 64, 3)
    assert ResizeLongestSide(64).target_length == 64
    assert ResizeLongestSide.get_preprocess_shape(60, 70, 64) == (55, 64)


def test_sizes_and_device(predictor):
    names = ("original_size", "input_size", "orig_h", "orig_w", "input_h", "input_w", "features")
    assert [getattr(predictor, name) for name in names] == [None] * 7
    predictor.set_image(photo())
    expected = [SIZE, INPUT_SIZE, *SIZE, *INPUT_SIZE]
    assert [getattr(predictor, name) for name in names[:6]] == expected
    np.testing.assert_array_equal(predictor.features, predictor.get_image_embedding())
    assert predictor.device == jax.devices()[0]
    device = jax.devices()[2]
    variables = jax.device_put(predictor.variables, device)
    assert sam_jax.SamPredictor(predictor.model, variables).device == device


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_a_saved_embedding_is_set_in_any_order(predictor, tiny, order):
    predictor.set_image(photo())
    expected = predictor.predict(**CLICK)
    other = sam_jax.SamPredictor(*tiny)
    other.set_image(photo((40, 31), seed=1))  # is replaced
    values = [
        ("features", predictor.features),
        ("original_size", list(SIZE)),
        ("input_size", INPUT_SIZE),
        ("is_image_set", True),
    ]
    for i in order:
        setattr(other, *values[i])
    assert_equal(other.predict(**CLICK), expected)
    other.is_image_set = False
    assert not other.is_image_set
    assert other.features is None
    with pytest.raises(RuntimeError, match="no image is set"):
        other.predict(**CLICK)


def test_incomplete_and_wrong_embeddings_are_errors(predictor):
    predictor.features = np.zeros((1, 32, 6, 9))
    with pytest.raises(RuntimeError, match="features are set without original_size"):
        predictor.predict(**CLICK)
    predictor.original_size = SIZE
    predictor.input_size = (48, 57)
    with pytest.raises(RuntimeError, match=r"input_size was set to \(48, 57\), but .* \(48, 56\)"):
        predictor.predict(**CLICK)
    predictor.set_image(photo())
    predictor.original_size = (61, 70)
    with pytest.raises(RuntimeError, match=r"original_size was set to \(61, 70\), but the image"):
        predictor.predict(**CLICK)
    with pytest.raises(ValueError, match=r"features must have shape \(1, 32, 6, 9\); got \(1, 6"):
        predictor.features = np.zeros((1, 6, 9, 32))
    with pytest.raises(ValueError, match="features must be finite"):
        predictor.features = np.full((1, 32, 6, 9), np.nan)


@pytest.mark.parametrize(
    ("name", "ours"), [("predict_torch", "predict_many"), ("set_torch_image", "predict_batch")]
)
def test_methods_on_tensors_name_ours(predictor, name, ours):
    assert not hasattr(predictor, name)
    with pytest.raises(AttributeError, match=f"{name} takes tensors of PyTorch.*{ours}"):
        getattr(predictor, name)


def test_a_bound_model_needs_no_variables(tiny):
    model, variables = tiny
    predictor = sam_jax.SamPredictor(model.bind(variables))
    assert predictor.model == model
    assert predictor.model.scope is None
    with pytest.raises(ValueError, match="variables must be given, as sam_jax"):
        sam_jax.SamPredictor(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_predict_the_same(predictor, duplicate):
    predictor.set_image(photo())
    expected = predictor.predict(**CLICK)
    assert_equal(duplicate(predictor).predict(**CLICK), expected)
    assert not duplicate(sam_jax.SamPredictor(*duplicate((predictor.model, {})))).is_image_set


def test_methods_of_the_model(tiny):
    model, _ = tiny
    assert (model.mask_threshold, model.image_format) == (0.0, "RGB")
    low_res = np.random.default_rng(0).normal(0, 6, (2, 3, 24, 36)).astype(np.float32)
    logits = model.postprocess_masks(low_res, INPUT_SIZE, SIZE)
    np.testing.assert_allclose(logits, postprocess_masks(low_res, SIZE, (48, 72)), atol=1e-4)
    image = photo(INPUT_SIZE)
    padded = model.preprocess(np.moveaxis(image, -1, 0)[None])
    assert padded.shape == (1, 3, 48, 72)
    assert not np.any(padded[..., 56:])
    expected = (image - np.array([123.675, 116.28, 103.53])) / [58.395, 57.12, 57.375]
    np.testing.assert_allclose(padded[0, ..., :56], np.moveaxis(expected, -1, 0), atol=1e-5)
