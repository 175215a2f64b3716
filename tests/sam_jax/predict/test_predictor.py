"""Tests the predictor: shapes, batches, errors, and the number of compiled programs.

These tests also cover `encode.py` and `decode_objects`.
"""

import doctest
import logging

import jax
import numpy as np
import pytest

import sam_jax
from sam_jax.model.ops import dispatch
from sam_jax.predict.decode import decode_prompts
from sam_jax.predict.encode import encode_images

CLICK = {"point_coords": np.array([[30.0, 20.0]]), "point_labels": np.array([1])}
CLICKS = {"point_coords": np.array([[30, 20], [5, 6], [50, 40]]), "point_labels": [1, 0, 0]}
BOX = {"box": np.array([5, 6, 40, 50])}
MASK = {"mask_input": np.random.default_rng(5).normal(0, 6, (1, 24, 36)).astype(np.float32)}
KINDS = [CLICK, CLICKS, BOX, CLICKS | BOX, MASK, CLICK | MASK, {}]


@pytest.fixture(scope="module")
def predictor(tiny):
    return sam_jax.SamPredictor(*tiny)


@pytest.fixture
def with_image(predictor):
    predictor.set_image(photo((60, 70)))
    return predictor


def photo(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def assert_close(prediction, expected):
    """Compares predictions, masks as logits, to 1e-5 of the largest magnitude."""
    for a, b in zip(prediction, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max(initial=0) <= 1e-5 * np.abs(b).max(initial=0)


@pytest.mark.parametrize(("multimask", "m"), [(True, 3), (False, 1)])
def test_shapes_and_types_are_the_official_ones(with_image, multimask, m):
    masks, scores, low_res = with_image.predict(**CLICK, multimask_output=multimask)
    assert (masks.shape, masks.dtype) == ((m, 60, 70), bool)
    assert (scores.shape, scores.dtype) == ((m,), np.float32)
    assert (low_res.shape, low_res.dtype) == ((m, 24, 36), np.float32)
    logits, _, _ = with_image.predict(**CLICK, multimask_output=multimask, return_logits=True)
    assert logits.dtype == np.float32
    assert np.array_equal(logits > 0, masks)
    assert (with_image.original_size, with_image.input_size) == ((60, 70), (48, 56))
    assert with_image.get_image_embedding().shape == (1, 32, 6, 9)


def test_low_resolution_logits_can_be_the_mask_input(with_image):
    _, scores, low_res = with_image.predict(**CLICK)
    masks, _, _ = with_image.predict(**CLICK, mask_input=low_res[[np.argmax(scores)]])
    assert masks.shape == (3, 60, 70)


def test_bgr_is_rgb_with_reversed_channels(predictor):
    image = photo((30, 50))
    predictor.set_image(image)
    rgb = predictor.get_image_embedding()
    predictor.set_image(np.ascontiguousarray(image[..., ::-1]), image_format="BGR")
    assert np.array_equal(predictor.get_image_embedding(), rgb)


def test_every_kind_of_prompt_changes_the_masks(with_image):
    logits = [with_image.predict(**kind)[2] for kind in KINDS]
    for i, a in enumerate(logits):
        assert all(np.abs(a - b).max() > 1e-2 for b in logits[:i])


def test_many_objects_equal_single_ones(with_image):
    """Uses programs for 32 and 4 objects, with and without masks, and prompts of all kinds."""
    prompts = (KINDS * 6)[:38]
    together = with_image.predict_many(prompts, return_logits=True)
    assert together[0].shape == (38, 3, 60, 70)
    for i in (0, 1, 2, 3, 4, 5, 6, 31, 32, 37):
        alone = with_image.predict(**prompts[i], return_logits=True)
        assert_close([x[i] for x in together], alone)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_of_images_equal_single_ones(predictor, batch_size):
    images = [
        photo(size, seed) for seed, size in enumerate([(60, 70), (20, 90), (99, 31), (48, 72)])
    ]
    prompts = [[CLICK], [], [BOX, CLICKS, CLICK | MASK], [CLICKS | BOX] * 5]
    results = predictor.predict_batch(images, prompts, return_logits=True, batch_size=batch_size)
    assert [len(masks) for masks, _, _ in results] == [1, 0, 3, 5]
    for image, image_prompts, result in zip(images, prompts, results, strict=True):
        predictor.set_image(image)
        assert_close(result, predictor.predict_many(image_prompts, return_logits=True))
        assert result[0].shape[1:] == (3, *image.shape[:2])


def test_operations_suit_the_device_that_holds_the_variables(tiny, monkeypatch):
    """Operations ask for the platform while a program is traced, which must be that device's."""
    model, variables = tiny
    device = jax.devices()[3]
    seen = []

    def choose(*args):
        seen.append(jax.config.jax_default_device)
        return original(*args)

    original = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", choose)
    # Another dtype, so that no program was compiled before.
    other = sam_jax.replace_fields(model, dtype="bfloat16")
    predictor = sam_jax.SamPredictor(other, jax.device_put(variables, device))
    predictor.set_image(photo((60, 70)))
    num_encoder_choices = len(seen)
    predictor.predict(**CLICK)
    assert 0 < num_encoder_choices < len(seen)
    assert set(seen) == {device}


def test_no_images_and_no_prompts_give_empty_results(predictor, with_image):
    assert predictor.predict_batch([], []) == []
    masks, scores, low_res = with_image.predict_many([])
    assert (masks.shape, scores.shape, low_res.shape) == ((0, 3, 60, 70), (0, 3), (0, 3, 24, 36))


def test_a_batch_does_not_change_the_image_that_is_set(with_image):
    before = with_image.get_image_embedding()
    with_image.predict_batch([photo((20, 20))], [[CLICK]])
    assert np.array_equal(with_image.get_image_embedding(), before)
    assert with_image.original_size == (60, 70)


@pytest.mark.slow
def test_new_image_sizes_compile_no_program(predictor, caplog):
    """Counts programs with `jax.log_compiles`, which also reports those outside the predictor."""
    rng = np.random.default_rng(0)

    def prompts(n, points):
        coords = rng.uniform(1, 15, (n, points, 2))
        return [{"point_coords": c, "point_labels": rng.integers(0, 2, points)} for c in coords]

    def use(size, n, points):
        image = photo(size)
        predictor.set_image(image)
        predictor.predict(**prompts(1, points)[0])
        predictor.predict_many(prompts(n, points))
        predictor.predict_batch([image], [prompts(n, points)])

    for points in (1, 5, 20, 50):  # a program for each number of slots
        for n in (1, 4, 32):
            use((40, 40), n, points)
    programs = encode_images._cache_size(), decode_prompts._cache_size()
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        for i in range(50):
            use((16 + i, 90 - i), 1 + i, 1 + i)
    assert (encode_images._cache_size(), decode_prompts._cache_size()) == programs
    compilations = [r.getMessage() for r in caplog.records if "compil" in r.getMessage().lower()]
    assert compilations == []


def test_log_compiles_reports_a_new_program(caplog):
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        jax.jit(lambda x: x + 1)(np.zeros(3))
    assert any("compil" in r.getMessage().lower() for r in caplog.records)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5), np.uint8), r"image must have shape \(height, width, 3\); got \(4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), r"got \(4, 5, 4\)"),
        (np.zeros((1, 4, 5, 3), np.uint8), r"got \(1, 4, 5, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), r"got \(0, 5, 3\)"),
        (np.zeros((4, 5, 3)), "image must be a numpy array of uint8, values 0 to 255; got float64"),
        ([[[0, 0, 0]]], "got list"),
    ],
)
def test_invalid_images_are_errors(with_image, without_type_checks, image, message):
    with pytest.raises(ValueError, match=message):
        with_image.set_image(image)
    assert with_image.original_size == (60, 70), "the image that was set stays"
    with_image.predict(**CLICK)
    with pytest.raises(ValueError, match=message):
        with_image.predict_batch([image], [[CLICK]])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"point_coords": [[1, 2]]}, "point_coords were given without point_labels"),
        ({"point_labels": [1]}, "point_labels were given without point_coords"),
        (
            {"point_coords": [1, 2], "point_labels": [1]},
            r"point_coords must have shape \(k, 2\), one \(x, y\) per point; got \(2,\)",
        ),
        ({"point_coords": [[1, 2, 3]], "point_labels": [1]}, r"got \(1, 3\)"),
        (
            {"point_coords": [[1, 2]], "point_labels": [1, 0]},
            r"point_labels must have shape \(1,\), one per point; got \(2,\)",
        ),
        (
            {"point_coords": [[1, 2], [3, 4]], "point_labels": [1, 255]},
            r"point_labels must be 1 \(foreground\) or 0 \(background\), or .* got \[255.0\]",
        ),
        (
            {"point_coords": [[1, np.nan]], "point_labels": [1]},
            "point_coords must be finite; got NaN or infinity",
        ),
        ({"point_coords": [["a", "b"]], "point_labels": [1]}, "point_coords must be an array"),
        ({"box": [1, 2, 3]}, r"box must have shape \(4,\): x0, y0, x1, y1; got \(3,\)"),
        ({"box": [0, 0, np.inf, 1]}, "box must be finite"),
        (
            {"mask_input": np.zeros((24, 35))},
            r"mask_input must be low-resolution logits of shape \(1, 24, 36\).*got \(24, 35\)",
        ),
        ({"mask_input": np.full((1, 24, 36), np.nan)}, "mask_input must be finite"),
    ],
)
def test_invalid_prompts_are_errors(with_image, prompt, message):
    with pytest.raises(ValueError, match=message) as caught:
        with_image.predict(**prompt)
    assert not str(caught.value).startswith("prompts")
    with pytest.raises(ValueError, match=rf"^prompts\[2\]: .*{message}"):
        with_image.predict_many([CLICK, CLICK, prompt])
    with pytest.raises(ValueError, match=rf"^prompts\[0\]\[1\]: .*{message}"):
        with_image.predict_batch([photo((20, 20))], [[CLICK, prompt]])


def test_invalid_batches_are_errors(with_image, without_type_checks):
    with pytest.raises(ValueError, match="prompts must hold one list for each of 1 images; got 2"):
        with_image.predict_batch([photo((20, 20))], [[CLICK], [CLICK]])
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        with_image.predict_batch([photo((20, 20))], [[CLICK]], batch_size=0)
    with pytest.raises(ValueError, match="a prompt must be a dict with keys among point_coords"):
        with_image.predict_many([{"points": [[1, 2]]}])
    with pytest.raises(ValueError, match="a prompt must be a dict"):
        with_image.predict_batch([photo((20, 20))], [CLICK])
    with pytest.raises(ValueError, match='image_format must be "RGB" or "BGR"; got \'rgb\''):
        with_image.set_image(photo((20, 20)), image_format="rgb")


def test_predicting_without_an_image_is_an_error(tiny):
    predictor = sam_jax.SamPredictor(*tiny)
    for use in (
        lambda: predictor.predict(**CLICK),
        lambda: predictor.predict_many([CLICK]),
        predictor.get_image_embedding,
    ):
        assert not predictor.is_image_set
        with pytest.raises(RuntimeError, match="no image is set: call set_image"):
            use()
    predictor.set_image(photo((20, 20)))
    assert predictor.is_image_set
    predictor.reset_image()
    with pytest.raises(RuntimeError, match="no image is set"):
        predictor.predict(**CLICK)


def test_the_example_runs(tiny, monkeypatch):
    monkeypatch.setattr(sam_jax, "load", lambda source: tiny)
    (example,) = doctest.DocTestFinder(recurse=False).find(
        sam_jax.SamPredictor, globs={"sam_jax": sam_jax, "np": np}
    )
    results = doctest.DocTestRunner().run(example)
    assert results.failed == 0
    assert results.attempted == 5
