"""The whole model: sizes, batches, padding, frames, precision, and errors for wrong shapes."""

import functools
import math
import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.special import ndtr

from sam_jax.model.image_encoder import Block, resize_positions
from sam_jax.model.layers import gelu, layer_norm
from sam_jax.model.prompt_encoder import ABSENT, Prompts
from sam_jax.model.sam import (
    PIXEL_MEAN,
    PIXEL_STD,
    Sam,
    build_sam,
    normalize,
    replace_fields,
    sam_tiny,
    sam_vit_b,
    sam_vit_h,
    sam_vit_l,
)

TOLERANCE = 1e-5  # of the largest magnitude


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert np.shape(actual) == np.shape(expected)
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def flat_shapes(model):
    """The shapes of a model's variables, by path; nothing is computed."""
    gh, gw = (side // model.patch_size for side in model.image_size)
    prompts = Prompts(
        points=jnp.zeros((1, 1, 2, 2)),
        labels=jnp.ones((1, 1, 2), jnp.int32),
        mask=jnp.zeros((1, 1, 4 * gh, 4 * gw)),
        has_mask=jnp.ones((1, 1), bool),
    )
    image = jnp.zeros((1, *model.image_size, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), image, prompts))
    return flax.traverse_util.flatten_dict(variables, sep="/")


def count(flat, part=""):
    return sum(math.prod(x.shape) for path, x in flat.items() if part in path)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 48, 72, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def embedding(tiny, encode, images):
    return encode(*tiny, images)


# Sizes and names.


@pytest.mark.parametrize(
    ("model", "total", "encoder", "tensors"),
    [
        (sam_vit_b(), 93_735_728, 89_670_912, 314),
        (sam_vit_l(), 312_343_088, 308_278_272, 482),
        (sam_vit_h(), 641_090_864, 637_026_048, 594),
    ],
    ids=["vit_b", "vit_l", "vit_h"],
)
def test_parameter_counts_of_the_official_sizes(model, total, encoder, tensors):
    flat = flat_shapes(model)
    assert count(flat) == total
    assert count(flat, "params/") == total - 256  # the Fourier matrix does not learn
    assert count(flat, "/image_encoder/") == encoder
    assert count(flat, "/prompt_encoder/") == 6_476
    assert count(flat, "/mask_decoder/") == 4_058_340
    assert len(flat) == tensors == 3 + 14 * model.image_encoder.depth + 6 + 17 + 120


def test_parameter_count_with_three_decoder_layers():
    assert count(flat_shapes(sam_vit_b(decoder_depth=3)), "/mask_decoder/") == 5_637_860


def test_the_tiny_size_is_well_under_a_million():
    assert count(flat_shapes(sam_tiny()), "params/") < 800_000


@pytest.mark.parametrize("model", [sam_vit_b(), sam_vit_l(), sam_vit_h()])
def test_official_sizes_are_four_equal_super_blocks(model):
    size = model.image_encoder.depth // 4
    assert model.image_encoder.global_blocks == (size - 1, 2 * size - 1, 3 * size - 1, 4 * size - 1)


def test_paths_are_snake_case_and_blocks_zero_padded():
    paths = flat_shapes(sam_tiny(depth=11, decoder_depth=2))
    assert "params/image_encoder/block_07/attention/qkv/kernel" in paths
    assert "params/image_encoder/block_10/lin2/bias" in paths
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", part) for p in paths for part in p.split("/"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variables_are_float32_whatever_the_compute_type(dtype):
    assert {x.dtype for x in flat_shapes(sam_tiny(dtype=dtype)).values()} == {np.dtype("float32")}


def test_the_fourier_matrix_is_the_one_constant():
    constants = {p: x.shape for p, x in flat_shapes(sam_vit_b()).items() if "params/" not in p}
    assert constants == {"constants/prompt_encoder/gaussian": (2, 128)}


ENCODER = "params/image_encoder"
DECODER = "params/mask_decoder"
PROMPTS = "params/prompt_encoder"
INITIAL = {  # a value, or ("within", bound) for uniform ones, or ("std", s) for normal ones
    f"{ENCODER}/pos_embed": ("std", 0.02),
    f"{ENCODER}/patch_embed/kernel": ("within", (6 / (8 * 8 * 3 + 64)) ** 0.5),
    f"{ENCODER}/patch_embed/bias": 0,
    f"{ENCODER}/block_00/norm1/scale": 1,
    f"{ENCODER}/block_00/norm1/bias": 0,
    f"{ENCODER}/block_00/attention/qkv/kernel": ("within", (6 / (64 + 192)) ** 0.5),
    f"{ENCODER}/block_00/attention/qkv/bias": 0,
    f"{ENCODER}/block_00/attention/rel_pos_h": 0,
    f"{ENCODER}/block_00/attention/rel_pos_w": 0,
    f"{ENCODER}/neck/conv1/kernel": ("within", 64**-0.5),
    f"{ENCODER}/neck/conv2/kernel": ("within", (9 * 64) ** -0.5),
    f"{PROMPTS}/foreground": ("std", 1),
    f"{PROMPTS}/mask_downscaling/conv2/kernel": ("within", (4 * 4) ** -0.5),
    f"{PROMPTS}/mask_downscaling/conv3/bias": ("within", 16**-0.5),
    "constants/prompt_encoder/gaussian": ("std", 0.35),
    f"{DECODER}/mask_tokens": ("std", 1),
    f"{DECODER}/transformer/layer_0/self_attention/q/kernel": ("within", 64**-0.5),
    f"{DECODER}/transformer/layer_0/token_to_image/out/kernel": ("within", 32**-0.5),
    f"{DECODER}/transformer/layer_0/image_to_token/q/bias": ("within", 64**-0.5),
    f"{DECODER}/transformer/layer_0/mlp/lin2/kernel": ("within", 256**-0.5),
    # PyTorch takes the outputs of a transposed convolution for its inputs.
    f"{DECODER}/upscaling/conv1/kernel": ("within", (4 * 16) ** -0.5),
    f"{DECODER}/upscaling/conv1/bias": ("within", (4 * 16) ** -0.5),
}


def test_initial_values(jit):
    """PyTorch's where the released code relies on them, MAE's (Xavier's) in the image encoder."""
    model = sam_tiny(depth=1, decoder_depth=1)
    image = jnp.zeros((1, *model.image_size, 3))
    prompts = prompts_of((1, 1, 1, 2), (1, 1, 1), (1, 1, 32, 32), (1, 1))

    @jit
    def some(key):
        flat = flax.traverse_util.flatten_dict(model.init(key, image, prompts), sep="/")
        return {path: flat[path] for path in INITIAL}

    for path, x in some(jax.random.key(0)).items():
        match INITIAL[path]:
            case "within", bound:
                assert 0.8 * bound < np.abs(x).max() <= bound, path
                assert abs(x.mean()) < 4 * bound / (3 * x.size) ** 0.5, path
            case "std", std:
                assert 0.75 * std < x.std() < 1.25 * std, path
                assert abs(x.mean()) < 4 * std / x.size**0.5, path
            case value:
                np.testing.assert_array_equal(x, value, path)


# A module is its own configuration.


def test_models_are_equal_hashable_and_cloned_by_their_fields():
    assert sam_vit_b() == Sam()
    assert hash(sam_vit_b()) == hash(Sam())
    assert sam_vit_b() != sam_vit_l()
    assert replace_fields(sam_vit_b(), depth=2) == build_sam(depth=2)
    assert replace_fields(sam_vit_h(dtype="bfloat16"), dtype="float32") == sam_vit_h()


# Batches and padding.

# Labels 1 and 0 are points, 2 and 3 a box's corners, -1 the padding point.
OBJECTS = {
    "one point": [(30, 20, 1), (0, 0, -1)],
    "box": [(5, 6, 2), (50, 33, 3)],
    "points": [(30, 20, 1), (60, 40, 0), (3, 44, 0), (0, 0, -1)],
    "box and points": [(30, 20, 1), (60, 40, 0), (5, 6, 2), (50, 33, 3)],
    "nothing": [],
}


def pack(objects, slots, rng, garbage=1e6):
    """Puts each object's tokens, in order, into any of the slots, and garbage into the others."""
    n = len(objects)
    points = rng.uniform(-garbage, garbage, (1, n, slots, 2)).astype(np.float32)
    labels = np.full((1, n, slots), ABSENT, np.int32)
    for i, tokens in enumerate(objects):
        for slot, (x, y, label) in zip(
            np.sort(rng.permutation(slots)[: len(tokens)]), tokens, strict=True
        ):
            points[0, i, slot] = x, y
            labels[0, i, slot] = label
    return Prompts(points=points, labels=labels)


def with_masks(prompts, mask, has_mask, rng):
    """Adds a mask prompt to some objects, and garbage to the others."""
    n = prompts.points.shape[1]
    masks = rng.uniform(-1e3, 1e3, (1, n, *mask.shape)).astype(np.float32)
    has = np.zeros((1, n), bool)
    for i in has_mask:
        masks[0, i], has[0, i] = mask, True
    return prompts.replace(mask=masks, has_mask=has)


def two_images(prompts, other):
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), prompts, other)


@pytest.fixture(scope="module")
def mask_prompt():
    return 8 * np.random.default_rng(5).standard_normal((24, 36)).astype(np.float32)


@pytest.mark.parametrize("kind", ["one point", "box", "nothing"])
def test_masks_do_not_depend_on_the_number_of_slots(tiny, embedding, decode, kind):
    rng = np.random.default_rng(1)
    few = decode(*tiny, embedding[:1], pack([OBJECTS[kind]], 2, rng))
    many = decode(*tiny, embedding[:1], pack([OBJECTS[kind]], 32, rng))
    huge = decode(*tiny, embedding[:1], pack([OBJECTS[kind]], 32, rng, garbage=1e30))
    for other in (many, huge):
        assert_close(other.logits, few.logits)
        assert_close(other.iou, few.iou)


@pytest.mark.parametrize("kind", list(OBJECTS))
@pytest.mark.parametrize("masked", [False, True])
def test_an_object_does_not_depend_on_the_rest_of_the_batch(
    tiny, embedding, decode, mask_prompt, kind, masked
):
    """Neither on other objects, nor on their masks, nor on other images."""
    rng = np.random.default_rng(2)
    alone = pack([OBJECTS[kind]], 32, rng)
    if masked:
        alone = with_masks(alone, mask_prompt, [0], rng)
    alone = decode(*tiny, embedding[:1], alone)

    kinds = [kind, *OBJECTS]
    ours = with_masks(
        pack([OBJECTS[k] for k in kinds], 32, rng), mask_prompt, [0, 2] if masked else [2], rng
    )
    others = with_masks(pack([OBJECTS[k] for k in kinds[::-1]], 32, rng), mask_prompt, [1], rng)
    batch = decode(*tiny, embedding, two_images(ours, others))
    assert_close(batch.logits[:1, :1], alone.logits)
    assert_close(batch.iou[:1, :1], alone.iou)

    swapped = decode(*tiny, embedding[::-1], two_images(others, ours))
    assert_close(swapped.logits[1:, :1], alone.logits)


def test_prompts_matter(tiny, embedding, decode):
    """Without which the invariances above would say nothing."""
    rng = np.random.default_rng(3)
    objects = [OBJECTS["one point"], [(31, 20, 1), (0, 0, -1)], [(30, 20, 0), (0, 0, -1)]]
    objects += [[(30, 20, 1)], [(30, 20, 1), (0, 0, 1)], []]
    logits = decode(
        *tiny, embedding, jax.tree.map(lambda x: np.repeat(x, 2, 0), pack(objects, 32, rng))
    )
    logits = np.asarray(logits.logits)
    flat = np.concatenate([logits[0], logits[1]]).reshape(2 * len(objects), -1)
    distance = np.abs(flat[:, None] - flat).max(-1) + np.eye(len(flat)) * 1e9
    assert distance.min() > 0.05
    assert 5 < np.abs(flat).max() < 100


def test_the_order_of_points_does_not_matter(tiny, embedding, decode):
    rng = np.random.default_rng(4)
    points = OBJECTS["points"]
    a = decode(*tiny, embedding[:1], pack([points], 32, rng))
    b = decode(*tiny, embedding[:1], pack([points[::-1]], 32, rng))
    assert_close(b.logits, a.logits)


def test_images_of_a_batch_do_not_meet(tiny, encode, embedding, images):
    for i in range(2):
        assert_close(encode(*tiny, images[i : i + 1])[0], embedding[i])


# Frames.


def transposed(variables):
    """The variables that do to a transposed image what `variables` do to the image."""
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    swapped = {}
    for path, x in flat.items():
        swap = {"rel_pos_h": "rel_pos_w", "rel_pos_w": "rel_pos_h"}
        *parents, name = path.split("/")
        if name in swap:
            swapped["/".join([*parents, swap[name]])] = x
        elif "upscaling" in parents or name == "pos_embed":
            swapped[path] = x.swapaxes(1, 2) if x.ndim == 4 else x
        elif name == "kernel" and x.ndim == 4:
            swapped[path] = x.swapaxes(0, 1)
        elif name == "gaussian":
            swapped[path] = x[::-1]
        else:
            swapped[path] = x
    return flax.traverse_util.unflatten_dict(swapped, sep="/")


@pytest.mark.parametrize("frame", [(48, 72), (80, 56)], ids=["stored", "interpolated"])
def test_height_and_width_are_treated_alike(tiny, encode, decode, frame):
    """A swap of the two anywhere (windows, tables, positions, pixels) breaks this."""
    model, variables = tiny
    model_t, variables_t = replace_fields(model, image_size=(72, 48)), transposed(variables)
    rng = np.random.default_rng(6)
    gh, gw = frame[0] // 8, frame[1] // 8
    image = rng.standard_normal((1, *frame, 3)).astype(np.float32)
    embedding = encode(model, variables, image)
    embedding_t = encode(model_t, variables_t, image.swapaxes(1, 2))
    assert embedding.shape == (1, gh, gw, 32)
    assert_close(embedding_t.swapaxes(1, 2), embedding)

    # The corners of a box are no transposes of each other's: two clicks instead.
    points = np.array([[[[10, 30], [40, 7]]]], np.float32)
    labels = np.array([[[1, 0]]], np.int32)
    mask = rng.standard_normal((1, 1, 4 * gh, 4 * gw)).astype(np.float32)
    prompts = Prompts(points, labels, mask, np.ones((1, 1), bool))
    prompts_t = Prompts(points[..., ::-1], labels, mask.swapaxes(2, 3), np.ones((1, 1), bool))
    masks = decode(model, variables, embedding, prompts)
    masks_t = decode(model_t, variables_t, embedding_t, prompts_t)
    assert masks.logits.shape == (1, 1, 4, 4 * gh, 4 * gw)
    assert_close(masks_t.logits.swapaxes(-1, -2), masks.logits)
    assert_close(masks_t.iou, masks.iou)


@pytest.mark.parametrize("frame", [(8, 8), (8, 40), (48, 72), (64, 64), (136, 8)])
def test_any_frame_that_the_patch_divides(tiny, frame):
    model, variables = tiny
    gh, gw = frame[0] // 8, frame[1] // 8
    prompts = pack([OBJECTS["points"]] * 3, 5, np.random.default_rng(0))
    run = lambda v, x, p: model.apply(v, x, p)
    masks = jax.eval_shape(run, variables, np.zeros((1, *frame, 3), np.float32), prompts)
    assert masks.logits.shape == (1, 3, 4, 4 * gh, 4 * gw)
    assert masks.iou.shape == (1, 3, 4)
    assert {masks.logits.dtype, masks.iou.dtype} == {np.dtype("float32")}


def test_positions_of_the_stored_size_are_untouched():
    table = jnp.arange(5 * 7 * 2, dtype=jnp.float32).reshape(1, 5, 7, 2)
    assert resize_positions(table, (5, 7)) is table


def bicubic(size, new_size):
    """PyTorch's matrix 'new_size size': A = -0.75, half-pixel centres, indices clamped."""
    matrix = np.zeros((new_size, size))
    for i in range(new_size):
        position = (i + 0.5) * size / new_size - 0.5
        below = math.floor(position)
        for j in range(below - 1, below + 3):
            d, a = abs(position - j), -0.75
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[i, min(max(j, 0), size - 1)] += near if d <= 1 else far
    return matrix


@pytest.mark.parametrize("grid", [(9, 4), (3, 11), (5, 8), (6, 7)])
def test_positions_of_other_sizes_are_interpolated_as_pytorch_does(grid):
    table = np.random.default_rng(0).standard_normal((1, 5, 7, 3))
    expected = np.einsum("ah,bw,nhwc->nabc", bicubic(5, grid[0]), bicubic(7, grid[1]), table)
    actual = resize_positions(jnp.asarray(table, jnp.float32), grid)
    np.testing.assert_allclose(actual, expected, atol=5e-6)


# Training.


def test_gradients_are_finite_and_reach_every_parameter(tiny, jit, images):
    """With prompts of every kind, and a loss that every output enters."""
    model, variables = tiny
    labels = np.array([[[1, -1, ABSENT], [0, 2, 3]]] * 2, np.int32)
    rng = np.random.default_rng(7)
    points = rng.uniform(0, 48, (2, 2, 3, 2)).astype(np.float32)
    mask = rng.standard_normal((2, 2, 24, 36)).astype(np.float32)
    prompts = Prompts(points, labels, mask, np.array([[True, False]] * 2))
    weights = rng.standard_normal((2, 2, 4, 24, 36)).astype(np.float32)

    def loss(params, image):
        masks = model.apply(variables | {"params": params}, image, prompts)
        return jnp.mean(weights * masks.logits) + jnp.mean(masks.iou**2)

    value, gradients = jit(jax.value_and_grad(loss, argnums=(0, 1)))(variables["params"], images)
    assert np.isfinite(value)
    flat = flax.traverse_util.flatten_dict(gradients[0], sep="/") | {"image": gradients[1]}
    assert all(np.isfinite(x).all() for x in flat.values())
    # Softmax takes away what the bias of the keys adds to all logits of a query.
    silent = {path for path, x in flat.items() if np.abs(x).max() < 1e-6}
    keys = "(self_attention|token_to_image|image_to_token|final_attention)/k/bias"
    assert all(re.search(keys, path) for path in silent), sorted(silent)
    assert all(np.abs(of_image).max() > 1e-4 for of_image in gradients[1])


@pytest.mark.parametrize(
    ("remat", "scan_blocks"), [("none", True), ("products", False), ("blocks", True)]
)
def test_remat_and_loops_change_neither_values_nor_gradients(tiny, jit, images, remat, scan_blocks):
    model, variables = tiny
    params, constants = variables["params"], variables["constants"]

    def loss(model, params, image):
        embedding = model.apply({"params": params, "constants": constants}, image, method="encode")
        return jnp.sum(embedding**3), embedding

    gradient = functools.partial(jit, static_argnums=0)(
        jax.value_and_grad(loss, argnums=(1, 2), has_aux=True)
    )
    other = replace_fields(model, remat=remat, scan_blocks=scan_blocks)
    (_, expected), gradients = gradient(model, params, images)
    (_, embedding), again = gradient(other, params, images)
    assert_close(embedding, expected)
    encoder = lambda x: jax.tree.leaves((x[0]["image_encoder"], x[1]))
    for a, b in zip(encoder(again), encoder(gradients), strict=True):
        assert_close(a, b)

    remats = lambda model: sum(
        name in ("checkpoint", "remat2")  # by JAX version
        for name in primitives(jax.make_jaxpr(lambda p: loss(model, p, images))(params))
    )
    if not scan_blocks:
        assert remats(other) == remats(model) + model.image_encoder.depth


@pytest.mark.parametrize("ends", [(), (0,), (0, 3), (1, 2), (0, 1, 3)])
def test_loops_need_equal_super_blocks(ends, images):
    model = sam_tiny(depth=4, global_blocks=ends, scan_blocks=True)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, method="encode"))
    with pytest.raises(
        ValueError, match=rf"equal distances.*got {re.escape(str(list(ends)))} of 4"
    ):
        jax.eval_shape(lambda v: model.apply(v, images, method="encode"), shapes)


def test_dropping_is_off_unless_training(tiny, encode, decode, embedding, images):
    model, variables = tiny
    dropping = replace_fields(model, drop_path=0.5, dropout=0.5)
    prompts = pack([OBJECTS["points"]], 32, np.random.default_rng(0))
    assert_close(encode(dropping, variables, images), embedding)
    expected = decode(model, variables, embedding[:1], prompts).logits
    assert_close(decode(dropping, variables, embedding[:1], prompts).logits, expected)
    # Without rates, training is not random and asks for no keys.
    assert_close(encode(model, variables, images, train=True), embedding)
    assert_close(decode(model, variables, embedding[:1], prompts, train=True).logits, expected)


def test_drop_path_follows_its_key(tiny, encode, embedding, images):
    model, variables = tiny
    dropping = replace_fields(model, drop_path=0.5)
    run = lambda seed: encode(
        dropping, variables, images, train=True, rngs={"drop_path": jax.random.key(seed)}
    )
    first = run(0)
    np.testing.assert_array_equal(run(0), first)
    assert np.abs(run(1) - first).max() > 0.1
    assert np.abs(first - embedding).max() > 0.1


def test_dropout_follows_its_key_and_differs_by_object(tiny, decode, embedding):
    model, variables = tiny
    dropping = replace_fields(model, dropout=0.5)
    prompts = pack([OBJECTS["points"]] * 2, 32, np.random.default_rng(0))
    run = lambda seed: (
        decode(
            dropping,
            variables,
            embedding[:1],
            prompts,
            train=True,
            rngs={"dropout": jax.random.key(seed)},
        ).logits
    )
    first = run(0)
    np.testing.assert_array_equal(run(0), first)
    assert np.abs(run(1) - first).max() > 0.1
    assert np.abs(first[:, 0] - first[:, 1]).max() > 0.1


@pytest.mark.parametrize(
    ("silent", "other", "branch"), [("lin2", "attention/proj", 0), ("attention/proj", "lin2", 1)]
)
def test_a_block_multiplies_each_branch_of_an_image_with_its_factor(jit, silent, other, branch):
    block = Block(num_heads=2, table_size=(3, 3), window=3, mlp_dim=16, dtype="float32")
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((1, 4, 5, 8)).astype(np.float32), 3, axis=0)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x[:1]))
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    flat = {path: rng.standard_normal(v.shape).astype(np.float32) for path, v in flat.items()}
    flat = {path: 0 * v if silent in path else v for path, v in flat.items()}
    assert any(other in path for path in flat)
    variables = flax.traverse_util.unflatten_dict(flat, sep="/")
    run = jit(block.apply)
    added = run(variables, x) - x
    factors = np.full((2, 3), 7.0, np.float32)  # of the silent branch: without effect
    factors[branch] = 0, 1, 2.5
    np.testing.assert_allclose(
        run(variables, x, factors) - x,
        added * factors[branch][:, None, None, None],
        rtol=1e-4,
        atol=1e-4,
    )


def test_branches_are_dropped_more_often_with_depth_and_keep_the_mean(tiny, jit):
    model, b = replace_fields(tiny[0], depth=4, drop_path=0.6), 2000
    draw = lambda model: model.image_encoder.sample_drop_path(b)
    keep = model.apply({}, rngs={"drop_path": jax.random.key(1)}, method=draw)
    assert keep.shape == (4, 2, b)
    for factors, rate in zip(keep, (0, 0.2, 0.4, 0.6), strict=True):
        dropped = factors == 0
        np.testing.assert_allclose(factors[~dropped], 1 / (1 - rate), rtol=1e-6)
        # Four standard deviations of a binomial, for each of the two branches.
        spread = 4 * (rate * (1 - rate) / b) ** 0.5
        assert np.abs(dropped.mean(axis=1) - rate).max() <= spread
        both = np.all(dropped, axis=0).mean()
        assert abs(both - rate**2) <= 4 * (rate**2 * (1 - rate**2) / b) ** 0.5


# Precision.


def equations(jaxpr):
    """Every equation of a jaxpr, also inside loops, calls and custom derivatives."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def primitives(jaxpr):
    return [equation.primitive.name for equation in equations(jaxpr)]


def products(function, *args):
    """(precision, dtype of the operands) of every matrix product and convolution."""
    for equation in equations(jax.make_jaxpr(function)(*args)):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.params["precision"], equation.invars[0].aval.dtype.name


HIGHEST = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)


@pytest.mark.parametrize("frame", [(48, 72), (64, 40)], ids=["stored", "interpolated"])
def test_float32_multiplies_in_float32(tiny, frame):
    """TPUs would round the factors to bfloat16, and GPUs to TF32, by default."""
    model, variables = tiny
    image = np.zeros((1, *frame, 3), np.float32)
    prompts = pack([OBJECTS["points"]], 5, np.random.default_rng(0))
    mask = np.zeros((1, 1, frame[0] // 2, frame[1] // 2), np.float32)
    prompts = prompts.replace(mask=mask, has_mask=np.ones((1, 1), bool))
    both = lambda v, x: model.apply(v, x, prompts).logits.sum()
    forward = list(products(both, variables, image))
    assert len(forward) > 60
    assert set(forward) == {(HIGHEST, "float32")}
    backward = list(products(jax.grad(both, argnums=(0, 1)), variables, image))
    assert len(backward) > 2 * len(forward)
    assert set(backward) == {(HIGHEST, "float32")}


def test_bfloat16_multiplies_in_bfloat16_except_for_positions(tiny):
    model, variables = tiny
    model = replace_fields(model, dtype="bfloat16")
    image = np.zeros((1, 48, 72, 3), np.float32)
    prompts = pack([OBJECTS["points"]], 5, np.random.default_rng(0))
    encoded = list(products(lambda v: model.apply(v, image, method="encode"), variables))
    assert {dtype for _, dtype in encoded} == {"bfloat16"}
    assert not {precision for precision, _ in encoded} & {HIGHEST}
    embedding = np.zeros((1, 6, 9, 32), jnp.bfloat16)
    decoded = list(
        products(lambda v: model.apply(v, embedding, prompts, method="decode"), variables)
    )
    exact = [dtype for precision, dtype in decoded if precision == HIGHEST]
    assert 1 <= len(exact) <= 2  # of the points, and of the grid
    assert set(exact) == {"float32"}
    assert {dtype for precision, dtype in decoded if precision != HIGHEST} == {"bfloat16"}


def test_bfloat16_stays_close_to_float32(tiny, jit, images):
    """Within 2 %, where kernels are so small that layers do not magnify what rounding does."""
    model, variables = tiny
    rng = np.random.default_rng(0)
    prompts = Prompts(
        points=rng.uniform(0, 48, (2, 8, 2, 2)).astype(np.float32),
        labels=np.tile(np.array([1, 0], np.int32), (2, 8, 1)),
        mask=rng.standard_normal((2, 8, 24, 36)).astype(np.float32),
        has_mask=rng.random((2, 8)) < 0.5,
    )
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    flat = {path: 0.3 * x if path.endswith("kernel") else x for path, x in flat.items()}
    variables = flax.traverse_util.unflatten_dict(flat, sep="/")
    run = lambda model: jit(model.apply)(variables, images, prompts)
    half_masks, masks = run(replace_fields(model, dtype="bfloat16")), run(model)
    for half_x, x in zip(jax.tree.leaves(half_masks), jax.tree.leaves(masks), strict=True):
        assert half_x.dtype == jnp.float32
        assert 0 < np.linalg.norm(half_x - x) / np.linalg.norm(x) < 0.02


# Layers.


def test_gelu_is_exact():
    """As PyTorch has it: 0.84134 at 1, where the approximation by tanh gives 0.84119."""
    x = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), x * ndtr(x), atol=3e-7)
    assert gelu(1.0) == pytest.approx(0.8413447, abs=1e-6)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
def test_norms_are_precise_far_from_zero_and_near_it(epsilon):
    """Far from zero the variance as a difference of means would be lost; near it epsilon counts."""

    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer_norm(epsilon, "float32", "norm")(x)

    norm = Norm()
    variables = {"params": {"norm": {"scale": np.array([2.0, 2, 2, 2]), "bias": np.ones(4)}}}
    far = np.array([4096.0, 4097, 4098, 4099], np.float32)
    by_hand = 1 + 2 * np.array([-1.5, -0.5, 0.5, 1.5]) / (1.25 + epsilon) ** 0.5
    np.testing.assert_allclose(norm.apply(variables, far), by_hand, rtol=1e-6)
    near = 1e-3 * np.array([-1.5, -0.5, 0.5, 1.5], np.float32)
    by_hand = 1 + 2 * near / (1.25e-6 + epsilon) ** 0.5
    np.testing.assert_allclose(norm.apply(variables, near), by_hand, rtol=1e-5)


# Normalisation.


def test_normalize_takes_the_colours_statistics_and_then_pads_with_zero():
    image = np.zeros((1, 3, 4, 3), np.uint8)
    image[0, 0, 0] = 124, 116, 104
    image[0, 2] = 200  # outside: must not be seen
    out = normalize(image, np.array([[2, 3]], np.int32))
    assert out.dtype == jnp.float32
    expected = (np.array([124, 116, 104]) - PIXEL_MEAN) / np.array(PIXEL_STD)
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(out[0, 1, 2], -np.array(PIXEL_MEAN) / PIXEL_STD, rtol=1e-6)
    np.testing.assert_array_equal(out[0, 2], 0)
    np.testing.assert_array_equal(out[0, :, 3], 0)


# Wrong shapes, and right ones.


def test_variables_may_be_numpy_arrays_that_a_traced_function_closes_over(tiny):
    model, variables = tiny
    prompts = pack([OBJECTS["points"]], 5, np.random.default_rng(0))
    run = lambda image: model.apply(variables, image, prompts)
    masks = jax.eval_shape(run, np.zeros((1, 48, 72, 3), np.float32))
    assert masks.logits.shape == (1, 1, 4, 24, 36)


@pytest.mark.parametrize(
    "shape",
    [(48, 72, 3), (1, 1, 48, 72, 3), (1, 48, 72, 4), (1, 50, 72, 3), (1, 48, 71, 3), (1, 0, 72, 3)],
)
def test_images_of_wrong_shapes_are_refused(tiny, shape):
    model, variables = tiny
    message = rf"image must have shape \(b, h, w, 3\).*\b8\b.*got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        model.apply(variables, np.zeros(shape, np.float32), method="encode")


def prompts_of(points, labels, mask=None, has_mask=None):
    made = lambda shape, dtype: None if shape is None else np.zeros(shape, dtype)
    return Prompts(
        made(points, np.float32),
        made(labels, np.int32),
        made(mask, np.float32),
        made(has_mask, bool),
    )


@pytest.mark.parametrize(
    ("embedding", "prompts", "message"),
    [
        ((6, 9, 32), ((1, 1, 2, 2), (1, 1, 2)), r"embedding must .*32\); got \(6, 9, 32\)"),
        ((1, 6, 9, 31), ((1, 1, 2, 2), (1, 1, 2)), r"embedding must .*; got \(1, 6, 9, 31\)"),
        ((1, 6, 9, 32), ((1, 2, 2), (1, 1, 2)), r"prompts.points must .*; got \(1, 2, 2\)"),
        ((1, 6, 9, 32), ((1, 1, 2, 3), (1, 1, 2)), r"prompts.points must .*; got \(1, 1, 2, 3\)"),
        (
            (2, 6, 9, 32),
            ((1, 1, 2, 2), (1, 1, 2)),
            r"\(2, n, k, 2\).*2 embeddings; got \(1, 1, 2, 2\)",
        ),
        ((1, 6, 9, 32), ((1, 1, 2, 2), (1, 1, 3)), r"prompts.labels .*; got .*\(1, 1, 3\)"),
        ((1, 6, 9, 32), ((1, 1, 2, 2), (1, 2)), r"prompts.labels .*; got .*\(1, 2\)"),
        (
            (1, 6, 9, 32),
            ((1, 1, 2, 2), (1, 1, 2), (1, 1, 36, 24), (1, 1)),
            r"prompts.mask must have shape \(1, 1, 24, 36\); got \(1, 1, 36, 24\)",
        ),
        (
            (1, 6, 9, 32),
            ((1, 1, 2, 2), (1, 1, 2), (1, 1, 24, 36), None),
            r"prompts.mask and prompts.has_mask must both be given, or neither",
        ),
        (
            (1, 6, 9, 32),
            ((1, 1, 2, 2), (1, 1, 2), None, (1, 1)),
            r"prompts.mask and prompts.has_mask must both be given, or neither",
        ),
        (
            (1, 6, 9, 32),
            ((1, 2, 2, 2), (1, 2, 2), (1, 2, 24, 36), (1,)),
            r"prompts.has_mask must have shape \(1, 2\); got \(1,\)",
        ),
        (
            (1, 6, 9, 32),
            ((1, 2, 2, 2), (1, 2, 2), (1, 2, 24, 36), (1, 1)),
            r"prompts.has_mask must have shape \(1, 2\); got \(1, 1\)",
        ),
    ],
)
def test_prompts_of_wrong_shapes_are_refused(tiny, embedding, prompts, message):
    model, variables = tiny
    with pytest.raises(ValueError, match=message):
        model.apply(
            variables, np.zeros(embedding, np.float32), prompts_of(*prompts), method="decode"
        )


@pytest.mark.parametrize("n", [0, 2])
def test_no_objects_and_no_slots_are_fine(tiny, n):
    model, variables = tiny
    decode = lambda v, e: model.apply(v, e, prompts_of((1, n, 0, 2), (1, n, 0)), method="decode")
    masks = jax.eval_shape(decode, variables, np.zeros((1, 6, 9, 32), np.float32))
    assert masks.logits.shape == (1, n, 4, 24, 36)
