"""Compares the model and its predictor with segment-anything in float32.

The weights are random. The first tests check that every tensor affects the outputs.
"""

import copy
import math
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import sam_jax

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-4  # of the largest magnitude
MASK_IOU = 0.9999
BFLOAT16_TOLERANCE = 0.02  # relative L2

SMALL = 0.01  # scale of activations at which the epsilons of norms affect the outputs
PHOTOS = {  # (height, width); the canvas is 64 x 64
    "landscape, larger": (75, 131),
    "portrait, larger": (200, 87),
    "square, larger": (90, 90),
    "landscape, smaller": (21, 50),
    "portrait, smaller": (43, 30),
    "square, same size": (64, 64),
}
TRUCK = Path(__file__).parents[3] / "shared" / "realdata" / "sam_images" / "truck.jpg"

# The number of values in a file, the number in the image encoder, and the number of tensors.
SIZES = {
    "vit_b": (93_735_728, 89_670_912, 314),
    "vit_l": (312_343_088, 308_278_272, 482),
    "vit_h": (641_090_864, 637_026_048, 594),
}


class TestRandomWeights:
    """Tests that an error in any tensor of the random weights changes the outputs."""

    def test_logits_span_ten(self, tiny_reference):
        for logits, _ in _outputs(tiny_reference):
            assert 5 < logits.abs().max() < 20
            assert (logits.flatten(1).std(dim=1) > 0.5).all()

    def test_logits_depend_on_the_click(self, tiny_reference):
        clicks = [(_points(tiny_reference, x, 0.4), None, None) for x in (0.3, 0.7)]
        first, second = (
            logits for logits, _ in _run(tiny_reference, _noise(tiny_reference), clicks)[1]
        )
        change = (first - second).flatten(1).norm(dim=1) / first.flatten(1).norm(dim=1)
        assert (change > 0.05).all()

    def test_every_tensor_matters(self, tiny_reference):
        """Adds noise as large as the tensor. Outputs must change by ten times the tolerance."""
        model = copy.deepcopy(tiny_reference)
        before, changes = _outputs(model), {}
        for name, tensor in model.state_dict().items():
            kept = tensor.clone()
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
            tensor.add_(noise * kept.square().mean().sqrt())
            changes[name] = _change(_outputs(model), before)
            tensor.copy_(kept)
        # Key biases add one number to all logits of a query, which does not change the softmax.
        without_effect = {name for name in changes if name.endswith(".k_proj.bias")}
        assert len(without_effect) == 7
        assert all(changes[name] < 0.1 * TOLERANCE for name in without_effect)
        assert not {
            n: c for n, c in changes.items() if n not in without_effect and c < 10 * TOLERANCE
        }

    def test_every_epsilon_matters_where_activations_are_small(self, tiny_reference):
        model = _with_small_activations(tiny_reference)
        before = _outputs(model, SMALL)
        norms = [m for m in model.modules() if "Norm" in type(m).__name__]
        assert len(norms) == 22
        for norm in norms:
            kept, norm.eps = norm.eps, {1e-5: 1e-6, 1e-6: 1e-5}[norm.eps]
            assert _change(_outputs(model, SMALL), before) > 10 * TOLERANCE
            norm.eps = kept


@pytest.fixture(scope="module")
def tiny_model(tiny_reference, tmp_path_factory):
    return _load(tiny_reference, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=PHOTOS.values(), ids=PHOTOS)
def pair(request, segment_anything, tiny_reference, tiny_model, photo):
    """Returns both predictors with the same photo."""
    return _pair(segment_anything, tiny_reference, tiny_model, photo(request.param))


def test_embeddings_equal_the_reference(pair, difference):
    actual, expected = (p.get_image_embedding() for p in (pair.predictor, pair.reference))
    assert difference(actual, expected) <= TOLERANCE


def test_predictions_equal_the_reference(pair, prompts, difference, kind, multimask_output):
    _check_prediction(pair, prompts, difference, kind, multimask_output)


def test_full_size_logits_equal_the_reference(pair, prompts, difference):
    given = prompts(pair.photo.shape[:2], 32)["box and points"]
    expected, actual = (
        p.predict(**given, return_logits=True)[0] for p in (pair.reference, pair.predictor)
    )
    assert actual.dtype == expected.dtype
    assert difference(actual, expected) <= TOLERANCE


def test_embeddings_of_bgr_images_equal_the_reference(pair, difference):
    for predictor in (pair.predictor, pair.reference):
        predictor.set_image(np.ascontiguousarray(pair.photo[..., ::-1]), image_format="BGR")
    actual, expected = (p.get_image_embedding() for p in (pair.predictor, pair.reference))
    assert difference(actual, expected) <= TOLERANCE


def test_predictions_of_three_decoder_blocks_equal_the_reference(
    segment_anything, build_tiny_reference, tmp_path, photo, prompts, difference
):
    reference = build_tiny_reference(decoder_depth=3)
    pair = _pair(segment_anything, reference, _load(reference, tmp_path), photo((75, 131)))
    for kind, multimask_output in (("several points", True), ("mask and box", False)):
        _check_prediction(pair, prompts, difference, kind, multimask_output)


def test_epsilons_equal_the_reference(
    segment_anything, tiny_reference, tmp_path, photo, prompts, difference
):
    reference = _with_small_activations(tiny_reference)
    pair = _pair(segment_anything, reference, _load(reference, tmp_path), photo((75, 131)))
    test_embeddings_equal_the_reference(pair, difference)
    for kind in ("several points", "mask and box"):
        given = prompts((75, 131), 32)[kind]
        given = given | {k: SMALL * v for k, v in given.items() if k == "mask_input"}
        expected, actual = (p.predict(**given) for p in (pair.reference, pair.predictor))
        assert difference(actual[1], expected[1]) <= TOLERANCE
        assert difference(actual[2], expected[2]) <= TOLERANCE


@pytest.mark.parametrize("grid", [(5, 11), (10, 7)], ids=["landscape", "portrait"])
def test_images_that_are_not_square(tiny_reference, tiny_model, encode, decode, difference, grid):
    """Compares with a reference whose position tables were interpolated to the other grid."""
    reference = _on_grid(tiny_reference, grid)
    height, width = reference.prompt_encoder.input_image_size
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, height, width, 3)).astype(np.float32)
    points = rng.uniform(0, (width, height), (1, 3, 2)).astype(np.float32)
    labels = np.array([[1, 0, 1]])
    mask = rng.normal(0, 6, (1, 4 * grid[0], 4 * grid[1])).astype(np.float32)
    prompt = ((torch.tensor(points), torch.tensor(labels)), None, torch.tensor(mask[None]))
    embedding, [(logits, iou)] = _run(reference, torch.tensor(image).permute(0, 3, 1, 2), [prompt])

    model, variables = tiny_model
    given = sam_jax.Prompts(
        points=np.append(points, np.zeros((1, 1, 2), np.float32), axis=1)[None],
        labels=np.append(labels, [[-1]], axis=1)[
            None
        ],  # the reference appends the padding point itself
        mask=mask[None],
        has_mask=np.ones((1, 1), bool),
    )
    actual = encode(model, variables, image)
    masks = decode(model, variables, actual, given)
    assert difference(actual, embedding.permute(0, 2, 3, 1)) <= TOLERANCE
    assert difference(masks.logits[0, 0], logits) <= TOLERANCE
    assert difference(masks.iou[0, 0], iou) <= TOLERANCE


@pytest.fixture(scope="module")
def vit_b(segment_anything, randomize_weights, tmp_path_factory):
    """Returns ViT-B as a reference model and in `sam_jax`, with the same weights."""
    if not TRUCK.exists():
        pytest.skip(f"no photo at {TRUCK}")
    torch.manual_seed(0)
    reference = randomize_weights(segment_anything.sam_model_registry["vit_b"]())
    return reference, _load(reference, tmp_path_factory.mktemp("vit_b"))


@pytest.fixture(scope="module")
def truck(segment_anything, vit_b):
    """Yields both predictors with the photo of a truck.

    Compiled programs are dropped before and after, since they take memory.
    """
    jax.clear_caches()
    torch.set_num_threads(2)
    yield _pair(segment_anything, *vit_b, np.asarray(Image.open(TRUCK)))
    torch.set_num_threads(1)
    jax.clear_caches()


def test_vit_b_embeddings_equal_the_reference(truck, difference):
    actual, expected = (p.get_image_embedding() for p in (truck.predictor, truck.reference))
    assert difference(actual, expected) <= TOLERANCE


def test_vit_b_predictions_equal_the_reference(truck, prompts, difference, kind, multimask_output):
    if kind == "one point" and multimask_output:
        low_res = truck.reference.predict(**prompts((1200, 1800), 256)[kind])[2]
        assert 5 < np.abs(low_res).max() < 30
    _check_prediction(truck, prompts, difference, kind, multimask_output)


def test_vit_b_predictions_in_bfloat16_are_close_to_float32(truck, prompts):
    model, variables = truck.predictor.model, truck.predictor.variables
    bfloat16_predictor = sam_jax.SamPredictor(
        sam_jax.replace_fields(model, dtype="bfloat16"), variables
    )
    bfloat16_predictor.set_image(truck.photo)
    errors = {}
    for kind in ("one point", "box", "mask and points", "mask and box"):
        given = prompts(truck.photo.shape[:2], 256)[kind]
        for multimask_output in (True, False):
            expected, actual = (
                p.predict(**given, multimask_output=multimask_output)[2]
                for p in (truck.predictor, bfloat16_predictor)
            )
            error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
            errors[kind, multimask_output] = float(error)
    assert max(errors.values()) <= BFLOAT16_TOLERANCE, errors


@pytest.mark.parametrize("size", SIZES)
def test_official_sizes_have_the_reference_names_and_shapes(
    segment_anything, official_shapes, size
):
    """Compares names and shapes with the reference, and the number of values with SIZES."""
    with torch.device("meta"):
        reference = segment_anything.sam_model_registry[size]()
    shapes = official_shapes(getattr(sam_jax, f"sam_{size}")())
    assert shapes == {name: tuple(x.shape) for name, x in reference.state_dict().items()}

    values = {name: math.prod(shape) for name, shape in shapes.items()}
    in_encoder = [n for name, n in values.items() if name.startswith("image_encoder.")]
    assert (sum(values.values()), sum(in_encoder), len(values)) == SIZES[size]


def _run(reference, image, given):
    """Returns the reference embedding of an image, and four masks and IoUs for each prompt."""
    outputs = []
    with torch.no_grad():
        embedding = reference.image_encoder(image)
        for prompt in given:
            sparse, dense = reference.prompt_encoder(*prompt)
            logits, iou = reference.mask_decoder.predict_masks(
                image_embeddings=embedding,
                image_pe=reference.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
            )
            outputs.append((logits[0], iou[0]))
    return embedding, outputs


def _outputs(reference, mask_scale=1):
    """Returns reference masks and IoUs on noise. The three prompts use all parts of the model."""
    grid = reference.prompt_encoder.mask_input_size
    mask = 6 * torch.randn((1, 1, *grid), generator=torch.Generator().manual_seed(0))
    box = reference.image_encoder.img_size * torch.tensor([[0.1, 0.15, 0.7, 0.6]])
    points = _points(reference, 0.2, 0.3, 0.6, 0.7)
    given = [(points, None, None), (None, box, None), (None, None, mask_scale * mask)]
    return _run(reference, _noise(reference), given)[1]


def _noise(reference):
    side = reference.image_encoder.img_size
    return torch.randn((1, 3, side, side), generator=torch.Generator().manual_seed(1))


def _points(reference, *xy):
    """Returns points at fractions of the image and alternating labels, for the prompt encoder."""
    points = reference.image_encoder.img_size * torch.tensor(xy).reshape(1, -1, 2)
    return points, 1 - torch.arange(points.shape[1])[None] % 2


def _change(new, old):
    """Returns the largest relative difference of any masks or IoUs."""
    pairs = [p for a, b in zip(new, old, strict=True) for p in zip(a, b, strict=True)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _with_small_activations(reference):
    """Returns a copy whose activations are so small that the epsilons of the norms matter."""
    model = copy.deepcopy(reference)
    scaled = [model.image_encoder.pos_embed, *model.image_encoder.patch_embed.parameters()]
    for module in model.modules():
        kind = type(module).__name__
        if "Norm" in kind or kind == "Embedding":
            scaled += module.parameters()
        elif kind in ("Linear", "Conv2d", "ConvTranspose2d") and module.bias is not None:
            scaled.append(module.bias)
    for tensor in {id(tensor): tensor for tensor in scaled}.values():
        tensor.data.mul_(SMALL)
    return model


def _load(reference, folder):
    """Returns the `sam_jax` model and variables, loaded from a checkpoint of the reference."""
    path = folder / "reference.pth"
    torch.save(reference.state_dict(), path)
    loaded = sam_jax.load(path)
    path.unlink()
    return loaded


def _pair(segment_anything, reference, loaded, photo):
    predictor, expected = sam_jax.SamPredictor(*loaded), segment_anything.SamPredictor(reference)
    for each in (expected, predictor):
        each.set_image(photo)
    return types.SimpleNamespace(predictor=predictor, reference=expected, photo=photo)


def _check_prediction(pair, prompts, difference, kind, multimask_output):
    """Compares the masks, the scores and the low-resolution logits of one prompt."""
    low_res = 4 * pair.reference.get_image_embedding().shape[-1]
    given = prompts(pair.photo.shape[:2], low_res)[kind]
    expected, actual = (
        p.predict(**given, multimask_output=multimask_output)
        for p in (pair.reference, pair.predictor)
    )
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
    assert difference(actual[1], expected[1]) <= TOLERANCE
    assert difference(actual[2], expected[2]) <= TOLERANCE
    for mask, expected_mask in zip(actual[0], expected[0], strict=True):
        assert _iou(mask, expected_mask) >= MASK_IOU


def _iou(a, b):
    union = (a | b).sum()
    return (a & b).sum() / union if union else 1.0


def _on_grid(reference, grid):
    """Returns a copy whose position tables are interpolated to a grid (gh, gw).

    Absolute positions are interpolated bicubically, and relative positions linearly.
    """
    model = copy.deepcopy(reference)
    interpolate = torch.nn.functional.interpolate
    encoder, prompt_encoder = model.image_encoder, model.prompt_encoder
    table = encoder.pos_embed.data.permute(0, 3, 1, 2)
    table = interpolate(table, size=grid, mode="bicubic", align_corners=False)
    encoder.pos_embed.data = table.permute(0, 2, 3, 1)
    for block in encoder.blocks:
        if block.window_size == 0:
            for table, side in ((block.attn.rel_pos_h, grid[0]), (block.attn.rel_pos_w, grid[1])):
                rows = interpolate(table.data.T[None], size=2 * side - 1, mode="linear")
                table.data = rows[0].T
    patch = encoder.img_size // prompt_encoder.image_embedding_size[0]
    prompt_encoder.image_embedding_size = grid
    prompt_encoder.input_image_size = (patch * grid[0], patch * grid[1])
    return model
