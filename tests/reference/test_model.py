"""The model and its predictor against segment-anything, live and in float32.

Random weights stand in for the released ones, and are shown first to leave no tensor out.
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

SMALL = 0.01  # activations of a model in which the epsilons of norms are seen
PHOTOS = {  # (height, width); the frame is 64 x 64
    "landscape, larger": (75, 131),
    "portrait, larger": (200, 87),
    "square, larger": (90, 90),
    "landscape, smaller": (21, 50),
    "portrait, smaller": (43, 30),
    "square, as the frame": (64, 64),
}
TRUCK = Path(__file__).parents[3] / "shared" / "realdata" / "sam_images" / "truck.jpg"

# All values of a file, those of the image encoder, and how many tensors they are.
SIZES = {
    "vit_b": (93_735_728, 89_670_912, 314),
    "vit_l": (312_343_088, 308_278_272, 482),
    "vit_h": (641_090_864, 637_026_048, 594),
}


class TestRandomWeights:
    """That parity with these weights means parity: what is wrong would be seen."""

    def test_logits_span_ten(self, tiny_reference):
        for logits, _ in _outputs(tiny_reference):
            assert 5 < logits.abs().max() < 20
            assert (logits.flatten(1).std(dim=1) > 0.5).all()

    def test_logits_depend_on_the_click(self, tiny_reference):
        clicks = [(_points(tiny_reference, x, 0.4), None, None) for x in (0.3, 0.7)]
        one, other = (
            logits for logits, _ in _run(tiny_reference, _noise(tiny_reference), clicks)[1]
        )
        change = (one - other).flatten(1).norm(dim=1) / one.flatten(1).norm(dim=1)
        assert (change > 0.05).all()

    def test_every_tensor_matters(self, tiny_reference):
        """As much noise as there is signal in a tensor changes outputs tenfold the tolerance."""
        model = copy.deepcopy(tiny_reference)
        before, changes = _outputs(model), {}
        for name, tensor in model.state_dict().items():
            kept = tensor.clone()
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
            tensor.add_(noise * kept.square().mean().sqrt())
            changes[name] = _change(_outputs(model), before)
            tensor.copy_(kept)
        # A bias of the keys adds one number to all logits of a query, which softmax takes out.
        immaterial = {name for name in changes if name.endswith(".k_proj.bias")}
        assert len(immaterial) == 7
        assert all(changes[name] < 0.1 * TOLERANCE for name in immaterial)
        assert not {n: c for n, c in changes.items() if n not in immaterial and c < 10 * TOLERANCE}

    def test_every_epsilon_matters_where_activations_are_small(self, tiny_reference):
        model = _quiet(tiny_reference)
        before = _outputs(model, SMALL)
        norms = [m for m in model.modules() if "Norm" in type(m).__name__]
        assert len(norms) == 22
        for norm in norms:
            kept, norm.eps = norm.eps, {1e-5: 1e-6, 1e-6: 1e-5}[norm.eps]
            assert _change(_outputs(model, SMALL), before) > 10 * TOLERANCE
            norm.eps = kept


@pytest.fixture(scope="module")
def tiny_ours(tiny_reference, tmp_path_factory):
    return _load(tiny_reference, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=PHOTOS.values(), ids=PHOTOS)
def pair(request, segment_anything, tiny_reference, tiny_ours, photo):
    """Both predictors on the same photo."""
    return _pair(segment_anything, tiny_reference, tiny_ours, photo(request.param))


def test_embedding(pair, difference):
    ours, theirs = pair.ours.get_image_embedding(), pair.theirs.get_image_embedding()
    assert difference(ours, theirs) <= TOLERANCE


def test_prediction(pair, prompts, difference, kind, multimask_output):
    _check_prediction(pair, prompts, difference, kind, multimask_output)


def test_logits_of_masks(pair, prompts, difference):
    given = prompts(pair.photo.shape[:2], 32)["box and points"]
    theirs, ours = (p.predict(**given, return_logits=True)[0] for p in (pair.theirs, pair.ours))
    assert ours.dtype == theirs.dtype
    assert difference(ours, theirs) <= TOLERANCE


def test_bgr(pair, difference):
    for predictor in (pair.ours, pair.theirs):
        predictor.set_image(np.ascontiguousarray(pair.photo[..., ::-1]), image_format="BGR")
    ours, theirs = pair.ours.get_image_embedding(), pair.theirs.get_image_embedding()
    assert difference(ours, theirs) <= TOLERANCE


def test_three_decoder_blocks(
    segment_anything, build_tiny_reference, tmp_path, photo, prompts, difference
):
    theirs = build_tiny_reference(decoder_depth=3)
    pair = _pair(segment_anything, theirs, _load(theirs, tmp_path), photo((75, 131)))
    for kind, multimask_output in (("several points", True), ("mask and box", False)):
        _check_prediction(pair, prompts, difference, kind, multimask_output)


def test_epsilons(segment_anything, tiny_reference, tmp_path, photo, prompts, difference):
    theirs = _quiet(tiny_reference)
    pair = _pair(segment_anything, theirs, _load(theirs, tmp_path), photo((75, 131)))
    test_embedding(pair, difference)
    for kind in ("several points", "mask and box"):
        given = prompts((75, 131), 32)[kind]
        given = given | {k: SMALL * v for k, v in given.items() if k == "mask_input"}
        theirs, ours = (p.predict(**given) for p in (pair.theirs, pair.ours))
        assert difference(ours[1], theirs[1]) <= TOLERANCE
        assert difference(ours[2], theirs[2]) <= TOLERANCE


@pytest.mark.parametrize("grid", [(5, 11), (10, 7)], ids=["landscape", "portrait"])
def test_frame_that_is_not_square(tiny_reference, tiny_ours, encode, decode, difference, grid):
    """The reference takes such frames when its position tables are interpolated by hand."""
    reference = _on_grid(tiny_reference, grid)
    height, width = reference.prompt_encoder.input_image_size
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, height, width, 3)).astype(np.float32)
    points = rng.uniform(0, (width, height), (1, 3, 2)).astype(np.float32)
    labels = np.array([[1, 0, 1]])
    mask = rng.normal(0, 6, (1, 4 * grid[0], 4 * grid[1])).astype(np.float32)
    prompt = ((torch.tensor(points), torch.tensor(labels)), None, torch.tensor(mask[None]))
    embedding, [(logits, iou)] = _run(reference, torch.tensor(image).permute(0, 3, 1, 2), [prompt])

    model, variables = tiny_ours
    given = sam_jax.Prompts(
        points=np.append(points, np.zeros((1, 1, 2), np.float32), axis=1)[None],
        labels=np.append(labels, [[-1]], axis=1)[None],  # the reference adds this one by itself
        mask=mask[None],
        has_mask=np.ones((1, 1), bool),
    )
    ours = encode(model, variables, image)
    masks = decode(model, variables, ours, given)
    assert difference(ours, embedding.permute(0, 2, 3, 1)) <= TOLERANCE
    assert difference(masks.logits[0, 0], logits) <= TOLERANCE
    assert difference(masks.iou[0, 0], iou) <= TOLERANCE


@pytest.fixture(scope="module")
def vit_b(segment_anything, randomize_weights, tmp_path_factory):
    """Both ViT-B, with the same weights."""
    if not TRUCK.exists():
        pytest.skip(f"there is no {TRUCK}")
    torch.manual_seed(0)
    reference = randomize_weights(segment_anything.sam_model_registry["vit_b"]())
    return reference, _load(reference, tmp_path_factory.mktemp("vit_b"))


@pytest.fixture(scope="module")
def truck(segment_anything, vit_b):
    """Both predictors on the truck. What was compiled before is dropped: it takes memory."""
    jax.clear_caches()
    torch.set_num_threads(2)
    yield _pair(segment_anything, *vit_b, np.asarray(Image.open(TRUCK)))
    torch.set_num_threads(1)
    jax.clear_caches()


def test_vit_b_embedding(truck, difference):
    ours, theirs = truck.ours.get_image_embedding(), truck.theirs.get_image_embedding()
    assert difference(ours, theirs) <= TOLERANCE


def test_vit_b_prediction(truck, prompts, difference, kind, multimask_output):
    if kind == "one point" and multimask_output:
        low_res = truck.theirs.predict(**prompts((1200, 1800), 256)[kind])[2]
        assert 5 < np.abs(low_res).max() < 30
    _check_prediction(truck, prompts, difference, kind, multimask_output)


def test_vit_b_bfloat16(truck, prompts):
    model, variables = truck.ours.model, truck.ours.variables
    half = sam_jax.SamPredictor(sam_jax.replace_fields(model, dtype="bfloat16"), variables)
    half.set_image(truck.photo)
    errors = {}
    for kind in ("one point", "box", "mask and points", "mask and box"):
        given = prompts(truck.photo.shape[:2], 256)[kind]
        for multimask_output in (True, False):
            expected, got = (
                p.predict(**given, multimask_output=multimask_output)[2] for p in (truck.ours, half)
            )
            error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
            errors[kind, multimask_output] = float(error)
    assert max(errors.values()) <= BFLOAT16_TOLERANCE, errors


@pytest.mark.parametrize("size", SIZES)
def test_sizes(segment_anything, official_shapes, size):
    """The same names and shapes as the reference, and as many values as are published."""
    with torch.device("meta"):
        reference = segment_anything.sam_model_registry[size]()
    shapes = official_shapes(getattr(sam_jax, f"sam_{size}")())
    assert shapes == {name: tuple(x.shape) for name, x in reference.state_dict().items()}

    values = {name: math.prod(shape) for name, shape in shapes.items()}
    in_encoder = [n for name, n in values.items() if name.startswith("image_encoder.")]
    assert (sum(values.values()), sum(in_encoder), len(values)) == SIZES[size]


def _run(reference, image, given):
    """The reference's embedding of an image, and its four masks and IoUs for each prompt."""
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
    """The reference's masks and IoUs on noise, for three prompts that use all of it."""
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
    """Points at fractions of the frame, of alternating labels, as the prompt encoder takes them."""
    points = reference.image_encoder.img_size * torch.tensor(xy).reshape(1, -1, 2)
    return points, 1 - torch.arange(points.shape[1])[None] % 2


def _change(new, old):
    """The largest relative difference of any masks or IoUs."""
    pairs = [p for a, b in zip(new, old, strict=True) for p in zip(a, b, strict=True)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _quiet(reference):
    """The reference with activations so small that norms would amplify them but for epsilon."""
    model = copy.deepcopy(reference)
    loud = [model.image_encoder.pos_embed, *model.image_encoder.patch_embed.parameters()]
    for module in model.modules():
        kind = type(module).__name__
        if "Norm" in kind or kind == "Embedding":
            loud += module.parameters()
        elif kind in ("Linear", "Conv2d", "ConvTranspose2d") and module.bias is not None:
            loud.append(module.bias)
    for tensor in {id(tensor): tensor for tensor in loud}.values():
        tensor.data.mul_(SMALL)
    return model


def _load(reference, folder):
    """Our model and variables from a checkpoint of the reference."""
    path = folder / "reference.pth"
    torch.save(reference.state_dict(), path)
    loaded = sam_jax.load(path)
    path.unlink()
    return loaded


def _pair(segment_anything, reference, loaded, photo):
    theirs, ours = segment_anything.SamPredictor(reference), sam_jax.SamPredictor(*loaded)
    for predictor in (theirs, ours):
        predictor.set_image(photo)
    return types.SimpleNamespace(theirs=theirs, ours=ours, photo=photo)


def _check_prediction(pair, prompts, difference, kind, multimask_output):
    """Compares masks and their logits, scores and low-resolution logits of one prompt."""
    low_res = 4 * pair.theirs.get_image_embedding().shape[-1]
    given = prompts(pair.photo.shape[:2], low_res)[kind]
    theirs, ours = (
        p.predict(**given, multimask_output=multimask_output) for p in (pair.theirs, pair.ours)
    )
    for got, expected in zip(ours, theirs, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
    assert difference(ours[1], theirs[1]) <= TOLERANCE
    assert difference(ours[2], theirs[2]) <= TOLERANCE
    for got, expected in zip(ours[0], theirs[0], strict=True):
        assert _iou(got, expected) >= MASK_IOU


def _iou(a, b):
    union = (a | b).sum()
    return (a & b).sum() / union if union else 1.0


def _on_grid(reference, grid):
    """The reference with its tables interpolated to a grid (gh, gw): bicubic, and linear."""
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
