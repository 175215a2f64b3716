"""Compares files and predictions with Hugging Face's `SamModel` and `SamProcessor`.

Each library must read the files that the other one writes. Where Hugging Face agrees with the
released code, it is also a second reference for predictions.
"""

import jax
import numpy as np
import pytest

import sam_jax
from sam_jax.images.resize import resize_and_pad
from sam_jax.weights.names import HF_GAUSSIAN, HF_GAUSSIAN_TWIN, huggingface_name

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-4  # of the largest magnitude
MASK_IOU = 0.9999
PHOTOS = {"landscape": (75, 131), "portrait": (50, 27)}  # (height, width); the canvas is 64 x 64
VISION = {
    "vit_b": dict(),
    "vit_l": dict(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        global_attn_indexes=[5, 11, 17, 23],
    ),
    "vit_h": dict(
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=16,
        global_attn_indexes=[7, 15, 23, 31],
    ),
}


@pytest.fixture(scope="module")
def model_and_variables(tiny_reference, tmp_path_factory):
    """Returns the `sam_jax` model and its variables."""
    path = tmp_path_factory.mktemp("official") / "tiny.pth"
    torch.save(tiny_reference.state_dict(), path)
    return sam_jax.load(path)


@pytest.fixture(scope="module")
def folder(model_and_variables, tmp_path_factory):
    """Returns a Hugging Face folder that `sam_jax.save` wrote."""
    path = tmp_path_factory.mktemp("huggingface") / "tiny"
    sam_jax.save(path, *model_and_variables, format="huggingface")
    return path


@pytest.fixture(scope="module")
def hf_model(folder):
    return _from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return transformers.SamProcessor.from_pretrained(folder)


def test_huggingface_loads_every_tensor(folder):
    model, report = transformers.SamModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("size", PHOTOS.values(), ids=PHOTOS)
def test_preprocessed_images_equal_those_of_the_processor(processor, photo, difference, size):
    expected = processor(images=photo(size), return_tensors="pt")
    image, inside = resize_and_pad(photo(size), (64, 64))
    assert inside == tuple(expected["reshaped_input_sizes"][0])
    image = sam_jax.normalize(image[None], np.array([inside]))
    assert difference(image, expected["pixel_values"].permute(0, 2, 3, 1)) <= 1e-6


@pytest.mark.parametrize("size", PHOTOS.values(), ids=PHOTOS)
def test_predictions_equal_huggingface(
    model_and_variables,
    hf_model,
    processor,
    photo,
    prompts,
    difference,
    size,
    kind,
    multimask_output,
):
    given = prompts(size, 32)[kind]
    expected = _predict(hf_model, processor, photo(size), given, multimask_output)
    predictor = sam_jax.SamPredictor(*model_and_variables)
    predictor.set_image(photo(size))
    masks, scores, low_res = predictor.predict(**given, multimask_output=multimask_output)
    assert difference(low_res, expected["low_res"]) <= TOLERANCE
    assert difference(scores, expected["scores"]) <= TOLERANCE
    for a, b in zip(masks, expected["masks"], strict=True):
        assert (a & b).sum() >= MASK_IOU * (a | b).sum()


def test_several_objects(model_and_variables, hf_model, processor, photo, difference):
    """Checks that several objects in one call have the predictions of Hugging Face."""
    size = (75, 131)
    rng = np.random.default_rng(0)
    points = rng.uniform(0, (size[1], size[0]), (3, 2, 2))
    labels = np.array([[1, 1], [1, 0], [0, 1]])
    inputs = processor(
        images=photo(size),
        input_points=[points.tolist()],
        input_labels=[labels.tolist()],
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = hf_model(
            pixel_values=inputs["pixel_values"],
            input_points=inputs["input_points"],
            input_labels=inputs["input_labels"],
        )
    predictor = sam_jax.SamPredictor(*model_and_variables)
    predictor.set_image(photo(size))
    _, scores, low_res = predictor.predict_many(
        [dict(point_coords=p, point_labels=k) for p, k in zip(points, labels, strict=True)]
    )
    assert difference(low_res, expected.pred_masks[0]) <= TOLERANCE
    assert difference(scores, expected.iou_scores[0]) <= TOLERANCE


def test_sam_jax_to_huggingface_and_back_is_bitwise(
    model_and_variables, folder, hf_model, tmp_path
):
    _assert_same(sam_jax.load(folder), model_and_variables)
    hf_model.save_pretrained(tmp_path / "huggingface")
    _assert_same(sam_jax.load(tmp_path / "huggingface"), model_and_variables)


@pytest.mark.parametrize("max_shard_size", ["1GB", "200KB"], ids=["one file", "shards"])
def test_huggingface_to_sam_jax_and_back_is_bitwise(
    folder, processor, photo, prompts, difference, tmp_path, max_shard_size
):
    model = _perturbed(transformers.SamModel(transformers.SamConfig.from_pretrained(folder)))
    model.save_pretrained(tmp_path / "huggingface", max_shard_size=max_shard_size)
    shards = list((tmp_path / "huggingface").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_size == "200KB")

    loaded = sam_jax.load(tmp_path / "huggingface")
    sam_jax.save(tmp_path / "saved", *loaded, format="huggingface")
    before, after = (
        m.state_dict() for m in (model, transformers.SamModel.from_pretrained(tmp_path / "saved"))
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    given = prompts((75, 131), 32)["box and points"]
    expected = _predict(model, processor, photo((75, 131)), given, True)
    predictor = sam_jax.SamPredictor(*loaded)
    predictor.set_image(photo((75, 131)))
    assert difference(predictor.predict(**given)[2], expected["low_res"]) <= TOLERANCE


@pytest.mark.parametrize("size", VISION)
def test_official_sizes_have_the_huggingface_names_and_shapes(official_shapes, size):
    """Compares the names and shapes of the three official sizes."""
    config = transformers.SamConfig(vision_config=VISION[size])
    with torch.device("meta"):
        expected = transformers.SamModel(config).state_dict()
    official = official_shapes(getattr(sam_jax, f"sam_{size}")())
    shapes = {huggingface_name(name): shape for name, shape in official.items()}
    shapes[HF_GAUSSIAN_TWIN] = shapes[HF_GAUSSIAN]
    assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}


def _from_pretrained(folder):
    return _as_released(transformers.SamModel.from_pretrained(folder))


def _as_released(model):
    """Sets the epsilon of the decoder's norms as in the released code. Hugging Face differs."""
    for layer in model.mask_decoder.transformer.layers:
        for norm in (layer.layer_norm1, layer.layer_norm2, layer.layer_norm3, layer.layer_norm4):
            norm.eps = 1e-5
    return model


def _perturbed(model):
    """Adds noise to initial values, since position tables and biases are initialized to zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return _as_released(model).eval()


def _predict(model, processor, image, given, multimask_output):
    """Predicts with Hugging Face, given the arguments of `sam_jax`'s `predict`."""
    inputs = {}
    if "point_coords" in given:
        inputs["input_points"] = [[given["point_coords"].tolist()]]
        inputs["input_labels"] = [[given["point_labels"].tolist()]]
    if "box" in given:
        inputs["input_boxes"] = [[given["box"].tolist()]]
    inputs = processor(images=image, **inputs, return_tensors="pt")
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    if "mask_input" in given:
        inputs["input_masks"] = torch.tensor(given["mask_input"])[None]
    with torch.no_grad():
        output = model(**inputs, multimask_output=multimask_output)
    (masks,) = processor.post_process_masks(output.pred_masks, *sizes)
    return dict(
        low_res=output.pred_masks[0, 0], scores=output.iou_scores[0, 0], masks=masks[0].numpy()
    )


def _assert_same(loaded, expected):
    """Asserts that models are equal, and that variables are bitwise equal."""
    assert loaded[0] == expected[0]
    leaves, expected_leaves = (
        dict(jax.tree_util.tree_leaves_with_path(v)) for _, v in (loaded, expected)
    )
    assert leaves.keys() == expected_leaves.keys()
    for path in leaves:
        a, b = np.asarray(leaves[path]), np.asarray(expected_leaves[path])
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32), str(path))
