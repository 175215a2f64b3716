"""Tests the model: sizes, fields, batches, padding, image sizes, and errors for wrong shapes."""

import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model.fields import check_rules
from sam_jax.model.image_encoder import ImageEncoder, patch_rules
from sam_jax.model.init import variable_shapes
from sam_jax.model.mask_decoder import MaskDecoder
from sam_jax.model.prompt_encoder import ABSENT, PromptEncoder, Prompts
from sam_jax.model.sam import (
    FLAT_FIELDS,
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
from tests.sam_jax.model.sam_cases import (
    OBJECTS,
    assert_close,
    count_values,
    pack,
    prompts_of,
    transpose_variables,
    two_images,
    with_masks,
)


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
    flat = variable_shapes(model)
    assert count_values(flat) == total
    assert count_values(flat, "params/") == total - 256  # the Fourier matrix is not trained
    assert count_values(flat, "/image_encoder/") == encoder
    assert count_values(flat, "/prompt_encoder/") == 6_476
    assert count_values(flat, "/mask_decoder/") == 4_058_340
    assert len(flat) == tensors == 3 + 14 * model.image_encoder.depth + 6 + 17 + 120


def test_parameter_count_with_three_decoder_layers():
    assert count_values(variable_shapes(sam_vit_b(decoder_depth=3)), "/mask_decoder/") == 5_637_860


def test_the_tiny_size_has_less_than_800_000_parameters():
    assert count_values(variable_shapes(sam_tiny()), "params/") < 800_000


@pytest.mark.parametrize("model", [sam_vit_b(), sam_vit_l(), sam_vit_h()])
def test_official_sizes_have_a_global_block_at_the_end_of_each_quarter(model):
    size = model.image_encoder.depth // 4
    assert model.image_encoder.global_blocks == (size - 1, 2 * size - 1, 3 * size - 1, 4 * size - 1)


# Fields.

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")


def test_models_are_equal_hashable_and_cloned_by_their_fields():
    assert sam_vit_b() == Sam()
    assert hash(sam_vit_b()) == hash(Sam())
    assert sam_vit_b() != sam_vit_l()
    assert replace_fields(sam_vit_b(), depth=2) == build_sam(depth=2)
    assert replace_fields(sam_vit_h(dtype="bfloat16"), dtype="float32") == sam_vit_h()


def test_the_share_of_objects_changes_no_part():
    model = sam_tiny(object_share=(0.25, 0.75))
    assert model == replace_fields(sam_tiny(), object_share=(0.25, 0.75)) != sam_tiny()
    assert hash(model) != hash(sam_tiny())
    assert replace_fields(model, object_share=None) == sam_tiny()
    assert replace_fields(model, depth=3) == sam_tiny(depth=3, object_share=(0.25, 0.75))
    assert variable_shapes(model) == variable_shapes(sam_tiny())
    model.validate()


@pytest.mark.parametrize("share", [(0.0, 0.5), (0.6, 0.5), (0.1, float("inf"))], ids=str)
def test_an_invalid_share_of_objects_is_named(share):
    message = "object_share must be None, or a smallest and a largest share above 0; got "
    with pytest.raises(ValueError, match=re.escape(f"{message}{share}")):
        Sam(object_share=share).validate()


def test_models_are_composed_of_their_parts():
    model = sam_tiny()
    composed = Sam(
        image_encoder=model.image_encoder,
        prompt_encoder=model.prompt_encoder,
        mask_decoder=model.mask_decoder,
    )
    assert composed == model
    assert hash(composed) == hash(model)
    assert {model: 1}[composed] == 1
    deeper = model.clone(mask_decoder=model.mask_decoder.clone(depth=3))
    assert deeper == replace_fields(model, decoder_depth=3) == sam_tiny(decoder_depth=3)
    assert deeper != model
    assert hash(deeper) != hash(model)
    assert Sam(ImageEncoder(), PromptEncoder(), MaskDecoder()) == sam_vit_b()


def test_models_composed_of_parts_have_the_same_parameters():
    composed = Sam(*(getattr(sam_tiny(), part) for part in PARTS))
    assert list(variable_shapes(composed)) == list(variable_shapes(sam_tiny()))


def field(model, location):
    """Returns a field of a part, e.g. "image_encoder.depth"."""
    part, name = location.split(".")
    return getattr(getattr(model, part), name)


def test_flat_fields_cover_all_fields_of_the_parts():
    locations = [location for found in FLAT_FIELDS.values() for location in found]
    fields = [
        f"{part}.{name}"
        for part in PARTS
        for name in getattr(Sam(), part).__dataclass_fields__
        if name not in ("parent", "name")
    ]
    assert sorted(locations) == sorted(fields)
    for found in FLAT_FIELDS.values():
        assert len({field(Sam(), location) for location in found}) == 1, found


@pytest.mark.parametrize("name", FLAT_FIELDS)
def test_a_flat_field_is_set_in_all_parts_that_have_it(name):
    value = other_value(field(sam_tiny(), FLAT_FIELDS[name][0]))
    model = replace_fields(sam_tiny(), **{name: value})
    for other, locations in FLAT_FIELDS.items():
        for location in locations:
            expected = value if other == name else field(sam_tiny(), location)
            assert field(model, location) == expected, location
    assert field(build_sam(**{name: value}), FLAT_FIELDS[name][0]) == value


def other_value(value):
    """Returns another value of the same type."""
    if isinstance(value, str):
        return {"float32": "bfloat16", "none": "blocks"}[value]
    if isinstance(value, tuple):
        return tuple(item + 1 for item in value)
    return not value if isinstance(value, bool) else value + type(value)(0.5 + 0.5)


@pytest.mark.parametrize(
    "call",
    [build_sam, sam_tiny, sam_vit_h, lambda **fields: replace_fields(Sam(), **fields)],
    ids=["build_sam", "sam_tiny", "sam_vit_h", "replace_fields"],
)
def test_an_unknown_field_is_an_error_that_lists_the_fields(call):
    message = f"Sam has no field 'depths'; its fields are {', '.join(FLAT_FIELDS)}, object_share"
    with pytest.raises(TypeError, match=re.escape(message)):
        call(depths=3)


def test_sizes_of_embeddings_and_masks():
    assert sam_vit_b().grid == (64, 64)
    assert sam_vit_b().low_res == (256, 256)
    model = sam_tiny(image_size=(48, 72))
    assert (model.grid, model.low_res) == ((6, 9), (24, 36))
    assert (model.image_size, model.patch_size, model.embedding_dim) == ((48, 72), 8, 64)
    assert (model.dtype, replace_fields(model, dtype="bfloat16").dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize("make", [sam_vit_b, sam_vit_l, sam_vit_h, sam_tiny])
def test_all_sizes_are_valid(make):
    make().validate()
    make(dtype="bfloat16", drop_path=0.4, dropout=0.1).validate()


def test_an_image_size_has_two_sides():
    with pytest.raises(ValueError, match="image_size must be two multiples of patch_size = 8"):
        check_rules(patch_rules((64,), 8))


INVALID = [
    (dict(patch_size=0), "image_encoder.patch_size must be at least 1; got 0"),
    (dict(image_size=(64, 60)), "image_encoder.image_size must be two multiples of patch_size = 8"),
    (dict(image_size=(64, 0)), "image_encoder.image_size must be two multiples"),
    (dict(num_heads=3), "image_encoder.embed_dim must be a positive multiple of num_heads = 3"),
    (dict(num_heads=0), "image_encoder.num_heads must be at least 1; got 0"),
    (dict(embed_dim=0), "image_encoder.embed_dim must be at least 1; got 0"),
    (dict(window_size=-3), "image_encoder.window_size must be at least 1; got -3"),
    (dict(mlp_ratio=0), "image_encoder.mlp_ratio must be at least 1; got 0"),
    (dict(decoder_mlp_dim=0), "mask_decoder.mlp_dim must be at least 1; got 0"),
    (dict(iou_hidden_dim=-1), "mask_decoder.iou_hidden_dim must be at least 1; got -1"),
    (dict(position_scale=-1.0), "prompt_encoder.position_scale must be at least 0; got -1.0"),
    (dict(drop_path=1.0), "image_encoder.drop_path must be at least 0 and below 1; got 1.0"),
    (dict(drop_path=-0.1), "image_encoder.drop_path must be at least 0; got -0.1"),
    (dict(prompt_dim=63), "prompt_encoder.dim must be a positive multiple of 2; got 63"),
    (dict(mask_channels=6), "prompt_encoder.mask_channels must be a positive multiple of 4; got 6"),
    (dict(mask_channels=0), "prompt_encoder.mask_channels must be at least 1; got 0"),
    (dict(decoder_heads=0), "mask_decoder.num_heads must be at least 1; got 0"),
    (dict(prompt_dim=60), "mask_decoder.dim must be a positive multiple of 8"),
    (dict(decoder_heads=3), "mask_decoder.dim must be a positive multiple of 24"),
    (dict(dropout=0.001), "mask_decoder.dropout must be 0, or 1/256 to 255/256; got 0.001"),
    (dict(dropout=1.0), "mask_decoder.dropout must be 0, or 1/256 to 255/256; got 1.0"),
]


@pytest.mark.parametrize(("fields", "message"), INVALID, ids=[str(fields) for fields, _ in INVALID])
def test_invalid_fields_are_named(fields, message):
    model = sam_tiny(**fields)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        model.validate()
    part = getattr(model, message.split(".")[0])
    with pytest.raises(ValueError, match=re.escape(message.split(".", 1)[1])):
        part.validate()


@pytest.mark.parametrize("part", ["prompt_encoder", "mask_decoder"])
@pytest.mark.parametrize(("name", "value"), [("dim", 32), ("dtype", "bfloat16")])
def test_parts_that_do_not_fit_together_are_named(part, name, value):
    model = sam_tiny()
    model = model.clone(**{part: getattr(model, part).clone(**{name: value})})
    other = "image_encoder.out_dim = 64" if name == "dim" else "image_encoder.dtype = 'float32'"
    message = f"prompt_encoder.{name} and mask_decoder.{name} must be equal to {other}; got"
    with pytest.raises(ValueError, match=re.escape(message)):
        model.validate()


# Batches and padding.


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
    """Compares a batch with other objects, masks and images to the object alone."""
    rng = np.random.default_rng(2)
    alone = pack([OBJECTS[kind]], 32, rng)
    if masked:
        alone = with_masks(alone, mask_prompt, [0], rng)
    alone = decode(*tiny, embedding[:1], alone)

    kinds = [kind, *OBJECTS]
    batch_with_object = with_masks(
        pack([OBJECTS[k] for k in kinds], 32, rng), mask_prompt, [0, 2] if masked else [2], rng
    )
    others = with_masks(pack([OBJECTS[k] for k in kinds[::-1]], 32, rng), mask_prompt, [1], rng)
    batch = decode(*tiny, embedding, two_images(batch_with_object, others))
    assert_close(batch.logits[:1, :1], alone.logits)
    assert_close(batch.iou[:1, :1], alone.iou)

    swapped = decode(*tiny, embedding[::-1], two_images(others, batch_with_object))
    assert_close(swapped.logits[1:, :1], alone.logits)


def test_different_prompts_give_different_masks(tiny, embedding, decode):
    """Checks that the invariances above are not trivial: other prompts give other masks."""
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


def test_images_of_a_batch_are_encoded_independently(tiny, encode, embedding, images):
    for i in range(2):
        assert_close(encode(*tiny, images[i : i + 1])[0], embedding[i])


# Image sizes.


@pytest.mark.parametrize("image_size", [(48, 72), (80, 56)], ids=["stored", "interpolated"])
def test_height_and_width_are_treated_alike(tiny, encode, decode, image_size):
    """Checks that a transposed image with transposed variables gives transposed results.

    This fails if height and width are swapped in windows, tables, positions or pixels.
    """
    model, variables = tiny
    model_t, variables_t = (
        replace_fields(model, image_size=(72, 48)),
        transpose_variables(variables),
    )
    rng = np.random.default_rng(6)
    gh, gw = image_size[0] // 8, image_size[1] // 8
    image = rng.standard_normal((1, *image_size, 3)).astype(np.float32)
    embedding = encode(model, variables, image)
    embedding_t = encode(model_t, variables_t, image.swapaxes(1, 2))
    assert embedding.shape == (1, gh, gw, 32)
    assert_close(embedding_t.swapaxes(1, 2), embedding)

    # The prompts are two clicks and a mask.
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


@pytest.mark.parametrize("image_size", [(8, 8), (8, 40), (48, 72), (64, 64), (136, 8)])
def test_image_sizes_may_be_any_multiples_of_the_patch_size(tiny, image_size):
    model, variables = tiny
    gh, gw = image_size[0] // 8, image_size[1] // 8
    prompts = pack([OBJECTS["points"]] * 3, 5, np.random.default_rng(0))
    images = np.zeros((1, *image_size, 3), np.float32)
    masks = jax.eval_shape(model.apply, variables, images, prompts)
    assert masks.logits.shape == (1, 3, 4, 4 * gh, 4 * gw)
    assert masks.iou.shape == (1, 3, 4)
    assert {masks.logits.dtype, masks.iou.dtype} == {np.dtype("float32")}


# Training.


def test_gradients_are_finite_and_reach_every_parameter(tiny, jit, images):
    """Uses prompts of every kind, and a loss that depends on every output."""
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
    # Key biases have zero gradients: they add one number to all logits of a query.
    without_gradient = {path for path, x in flat.items() if np.abs(x).max() < 1e-6}
    keys = "(self_attention|token_to_image|image_to_token|final_attention)/k/bias"
    assert all(re.search(keys, path) for path in without_gradient), sorted(without_gradient)
    assert all(np.abs(of_image).max() > 1e-4 for of_image in gradients[1])


# Normalization.


def test_normalize_standardizes_colors_and_then_sets_padding_to_zero():
    image = np.zeros((1, 3, 4, 3), np.uint8)
    image[0, 0, 0] = 124, 116, 104
    image[0, 2] = 200  # padding, which must become zero
    out = normalize(image, np.array([[2, 3]], np.int32))
    assert out.dtype == jnp.float32
    expected = (np.array([124, 116, 104]) - PIXEL_MEAN) / np.array(PIXEL_STD)
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(out[0, 1, 2], -np.array(PIXEL_MEAN) / PIXEL_STD, rtol=1e-6)
    np.testing.assert_array_equal(out[0, 2], 0)
    np.testing.assert_array_equal(out[0, :, 3], 0)


# Shapes.


def test_a_traced_function_may_close_over_numpy_variables(tiny):
    model, variables = tiny
    prompts = pack([OBJECTS["points"]], 5, np.random.default_rng(0))
    masks = jax.eval_shape(
        lambda image: model.apply(variables, image, prompts),
        np.zeros((1, 48, 72, 3), np.float32),
    )
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


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((1, 48, 72, 3), np.uint8), "got uint8"),
        (np.full((1, 48, 72, 3), 200, np.float32), "at most about 3; got values up to 200"),
        (jnp.full((1, 48, 72, 3), 200.0), "got values up to 200"),
    ],
)
def test_pixels_that_are_not_normalized_are_refused(tiny, image, found):
    model, variables = tiny
    for method in ("encode", "encode_trunk"):
        with pytest.raises(ValueError, match=rf"image must be normalized floats.*{found}"):
            model.apply(variables, image, method=method)
    if image.dtype == np.uint8:
        with pytest.raises(ValueError, match="got uint8"):
            jax.jit(lambda image: model.apply(variables, image, method="encode"))(image)


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
def test_objects_and_slots_may_be_empty(tiny, n):
    model, variables = tiny
    prompts = prompts_of((1, n, 0, 2), (1, n, 0))

    def decode(variables, embedding):
        return model.apply(variables, embedding, prompts, method="decode")

    masks = jax.eval_shape(decode, variables, np.zeros((1, 6, 9, 32), np.float32))
    assert masks.logits.shape == (1, n, 4, 24, 36)


def test_an_image_that_is_larger_than_the_canvas_is_an_error(tiny):
    model, variables = tiny
    bound = model.bind(variables)
    height, width = model.image_size
    for shape in ((1, 3, height + 1, width), (3, height, width + 1), (height, width, 3)):
        with pytest.raises(ValueError, match=r"shape \(\.\.\., 3, height, width\), with sides"):
            bound.preprocess(np.zeros(shape, np.float32))
    low = np.zeros((1, *model.low_res), np.float32)
    with pytest.raises(ValueError, match="input_size must be at most the model's input"):
        bound.postprocess_masks(low, (height, width + 1), (height, width + 1))
