"""Fixtures with PyTorch reference models, random weights for them, and inputs.

segment-anything imports four functions of torchvision. The tests do not need torchvision: small
substitutes replace these functions while segment-anything is imported.
"""

import functools
import importlib
import math
import sys
import types

import flax.traverse_util
import jax
import numpy as np
import pytest
from PIL import Image

from sam_jax.model.prompt_encoder import Prompts
from sam_jax.weights.names import official_names

# The grid has 8x8 tokens. Windows of 3x3 tokens need padding in both directions.
TINY = dict(
    image_size=64,
    patch_size=8,
    embed_dim=64,
    depth=4,
    num_heads=2,
    global_blocks=(1, 3),
    window_size=3,
    prompt_dim=64,
    mask_channels=16,
    decoder_depth=2,
    decoder_mlp_dim=128,
    iou_hidden_dim=48,
)

PROMPT_KINDS = (
    "one point",
    "several points",
    "box",
    "box and points",
    "mask",
    "mask and points",
    "mask and box",
    "no prompt",
)


@pytest.fixture(scope="session")
def segment_anything():
    """Returns the module, or skips the test if it is not installed."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # more threads do not speed up tiny models
    try:
        return import_segment_anything()
    except ModuleNotFoundError as error:
        if error.name != "segment_anything":
            raise
        pytest.skip("segment-anything is not installed")


@pytest.fixture(scope="session")
def build_tiny_reference(segment_anything):
    """Returns a function that builds a reference model. Keyword arguments override TINY."""

    def build(**sizes):
        return build_reference(**TINY | sizes)

    return build


@pytest.fixture(scope="session")
def randomize_weights(segment_anything):
    """Returns `randomize`."""
    return randomize


@pytest.fixture(scope="session")
def tiny_reference(build_tiny_reference):
    """Returns the reference model with the sizes TINY. Tests must copy it before changing it."""
    return build_tiny_reference()


@pytest.fixture(scope="session")
def official_shapes():
    """Returns `shapes_of_official`."""
    return shapes_of_official


@pytest.fixture(params=PROMPT_KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["three", "single"])
def multimask_output(request):
    return request.param


@pytest.fixture(scope="session")
def prompts():
    """Returns `make_prompts`."""
    return make_prompts


@pytest.fixture(scope="session")
def photo():
    """Returns `make_photo`."""
    return make_photo


@pytest.fixture(scope="session")
def difference():
    """Returns `relative_difference`."""
    return relative_difference


def relative_difference(actual, expected):
    """Returns the maximum absolute difference, divided by the largest magnitude in `expected`."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    return np.abs(actual - expected).max() / np.abs(expected).max()


def shapes_of_official(model):
    """Returns the PyTorch shape for each official name of a `sam_jax` model, without variables."""
    grid = [side // model.patch_size for side in model.image_size]
    given = Prompts(
        points=np.zeros((1, 1, 1, 2), np.float32),
        labels=np.zeros((1, 1, 1), np.int32),
        mask=np.zeros((1, 1, 4 * grid[0], 4 * grid[1]), np.float32),
        has_mask=np.ones((1, 1), bool),
    )
    image = jax.ShapeDtypeStruct((1, *model.image_size, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image, given)
    shapes = flax.traverse_util.flatten_dict(shapes, sep="/")
    table = official_names(model.image_encoder.depth, model.mask_decoder.depth)
    assert shapes.keys() == table.keys()
    return {
        name: layout.to_torch(np.broadcast_to(np.float32(0), shapes[path].shape)).shape
        for path, (name, layout) in table.items()
    }


def make_photo(size, seed=0):
    """Returns an image of smooth blobs and noise, 'h w 3' uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC), np.float64)
    return np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)


def make_prompts(size, low_res):
    """Returns arguments of `predict` for each of PROMPT_KINDS, on an image of (height, width)."""
    height, width = size
    rng = np.random.default_rng(0)
    coords = rng.uniform(0.05, 0.95, (6, 2)) * (width, height)
    one = dict(point_coords=coords[:1], point_labels=np.array([1]))
    several = dict(point_coords=coords, point_labels=np.array([1, 0, 1, 1, 0, 0]))
    box = dict(box=np.array([0.12, 0.2, 0.71, 0.83]) * (width, height, width, height))
    mask = dict(mask_input=rng.normal(0, 6, (1, low_res, low_res)).astype(np.float32))
    prompts = (one, several, box, box | several, mask, mask | several, mask | box, {})
    return dict(zip(PROMPT_KINDS, prompts, strict=True))


def build_reference(
    *,
    image_size,
    patch_size,
    embed_dim,
    depth,
    num_heads,
    global_blocks,
    window_size,
    prompt_dim,
    mask_channels,
    decoder_depth,
    decoder_mlp_dim,
    iou_hidden_dim,
    seed=0,
):
    """Returns segment-anything's `Sam` for square images, with the weights of `randomize`."""
    import_segment_anything()
    import torch
    from segment_anything import modeling

    grid = image_size // patch_size
    torch.manual_seed(seed)
    model = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            global_attn_indexes=global_blocks,
            window_size=window_size,
            out_chans=prompt_dim,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=prompt_dim,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=mask_channels,
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=prompt_dim,
            transformer=modeling.TwoWayTransformer(
                depth=decoder_depth, embedding_dim=prompt_dim, num_heads=8, mlp_dim=decoder_mlp_dim
            ),
            iou_head_hidden_dim=iou_hidden_dim,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )
    return randomize(model.eval(), seed)


def randomize(model, seed=0):
    """Replaces initial values so that every tensor affects the output.

    Weights that PyTorch initializes to 0 or 1 become random. Some other weights are scaled up, so
    that the logits span about -10 to 10 and depend on the click. With the initial values of
    PyTorch, attention is almost uniform, and the mean over channels dominates the image features.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    norm_weights = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__
    }
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(".bias"):
                tensor.copy_(0.1 * noise)
            elif name in norm_weights:
                tensor.copy_(1 + 0.1 * noise)
            elif "pos_embed" in name or "rel_pos" in name:
                tensor.copy_(0.2 * noise)

        decoder = model.mask_decoder
        for name, tensor in decoder.transformer.named_parameters():
            if "_attn_" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
                tensor.mul_(4)
        for mlp in decoder.output_hypernetworks_mlps:
            last = mlp.layers[-1].weight
            last.mul_(30 * math.sqrt(256 / last.shape[1]))  # fewer channels make smaller logits
        kernel = model.image_encoder.neck[2].weight
        kernel.copy_(4 * (kernel - kernel.mean(dim=1, keepdim=True)))
    return model


def import_segment_anything():
    """Imports segment-anything with substitutes for torchvision.

    The substitutes are removed from `sys.modules` after the import. Otherwise transformers would
    use them as if they were torchvision.
    """
    if "segment_anything" not in sys.modules:
        before = {name: sys.modules.get(name) for name in _SUBSTITUTES}
        try:
            for name, functions in _SUBSTITUTES.items():
                sys.modules[name] = types.ModuleType(name)
                vars(sys.modules[name]).update(functions)
            importlib.import_module("segment_anything")
        finally:
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module
    return sys.modules["segment_anything"]


def _box_area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _batched_nms(boxes, scores, idxs, iou_threshold):
    """Returns the indices that non-maximum suppression keeps of the boxes 'n 4', best first.

    Like torchvision on CPUs, it computes IoUs in float32 and compares them with a double.
    """
    import torch

    order = torch.argsort(scores, descending=True, stable=True)
    boxes, idxs = boxes[order].numpy(), idxs[order].numpy()
    area = _box_area(boxes)
    kept = np.zeros(len(boxes), bool)
    for i, box in enumerate(boxes):
        sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
        overlap = sides.clip(0).prod(axis=1)
        same_category = kept & (idxs == idxs[i])
        with np.errstate(invalid="ignore"):
            iou = overlap / (area + area[i] - overlap)
        kept[i] = not (iou > np.float64(iou_threshold))[same_category].any()
    return order[torch.from_numpy(kept)]


def _resize(image, size):
    return image.resize(size[::-1], Image.Resampling.BILINEAR)


_SUBSTITUTES = {
    "torchvision": {},
    "torchvision.ops": {},
    "torchvision.ops.boxes": {"batched_nms": _batched_nms, "box_area": _box_area},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {"resize": _resize, "to_pil_image": Image.fromarray},
}
